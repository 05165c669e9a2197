"""config.toml: what may stand in it, where it is found, and what it says; knows nothing of models.

Importable without MLX, numpy or PIL. The command line, the server and the documentation read the one table `SCHEMA`.
"""

from .files import Settings, UnknownProfile, default_place, find_config, load_settings
from .schema import (
    DEFAULT_PROFILE,
    LEAST_MEMORY,
    MOST_MEMORY,
    SCHEMA,
    TABLE,
    Setting,
    example_config,
    memory_figure,
)

__all__ = [
    "DEFAULT_PROFILE",
    "LEAST_MEMORY",
    "MOST_MEMORY",
    "SCHEMA",
    "TABLE",
    "Setting",
    "Settings",
    "UnknownProfile",
    "default_place",
    "example_config",
    "find_config",
    "load_settings",
    "memory_figure",
]
