"""What training differs in for Qwen-Image-2.1."""
