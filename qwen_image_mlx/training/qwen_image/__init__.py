"""What training differs in for Qwen-Image 1.x."""
