"""Qwen-Image 1.x: the dual-stream transformer and the autoencoder that it shares with Wan 2.1."""
