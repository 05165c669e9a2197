"""The networks of Qwen-Image-2.1: one stream of text and images, and a 16x autoencoder with an alpha channel."""
