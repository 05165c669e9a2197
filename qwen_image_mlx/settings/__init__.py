"""config.toml: its settings, where it is found, and its values.

Importable without MLX, numpy or PIL. Its table `SCHEMA` is made from the options (`runtime/options.py`).
"""

from .files import Settings, UnknownProfile, default_place, find_config, load_settings
from .schema import (
    DEFAULT_PROFILE,
    SCHEMA,
    TABLE,
    Setting,
    example_config,
)

__all__ = [
    "DEFAULT_PROFILE",
    "SCHEMA",
    "TABLE",
    "Setting",
    "Settings",
    "UnknownProfile",
    "default_place",
    "example_config",
    "find_config",
    "load_settings",
]
