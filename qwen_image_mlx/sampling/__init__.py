"""Schedules, noise and the one denoising loop."""
