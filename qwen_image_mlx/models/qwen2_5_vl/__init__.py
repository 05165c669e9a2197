"""Qwen2.5-VL, which encodes prompts and images for Qwen-Image 1.x."""
