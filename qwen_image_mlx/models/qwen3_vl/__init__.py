"""The networks of Qwen3-VL, which encodes prompts and reference images for Qwen-Image-2.1."""
