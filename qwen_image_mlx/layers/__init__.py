"""Layered images: stacks of layers, and the files that they are kept in."""
