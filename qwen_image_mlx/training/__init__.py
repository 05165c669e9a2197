"""Fine-tuning with LoRAs and training of all weights."""
