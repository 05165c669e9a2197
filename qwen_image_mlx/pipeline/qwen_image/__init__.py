"""The seams of Qwen-Image 1.x: its condition encoder and its denoiser."""
