"""What Qwen-Image 1.x does in its own way: how prompts become states, and how latents get their velocity."""
