"""What Qwen-Image-2.1 does at the seams: its denoiser, and its condition encoder."""
