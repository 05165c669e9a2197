"""Says whether this machine computes what it should, how fast, and in how much memory: `qwen-image-mlx doctor`.

A group of checks is a module with a function `run(options)` and a row in `groups.py`. Each group runs in a process of
its own (`python -m qwen_image_mlx.doctor`), so that a crash loses one group; `examine.py` starts them, and `report.py`
says what they found. Nothing is downloaded: weights come from an integer hash (`values.py`), which gives the same
numbers on every machine.
"""
