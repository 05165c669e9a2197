"""A model of MLX's Metal backend that runs anywhere: see `benchmarks/metal_model.py`."""
