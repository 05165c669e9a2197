"""LoRAs: files read and described, merged into weights or run unmerged."""
