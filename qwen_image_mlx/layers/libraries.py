"""The optional libraries that some formats of layers need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import RequestError

# Module -> the package to install.
_LIBRARIES = {"psd_tools": "psd-tools", "pptx": "python-pptx"}


def library(module: str, purpose: str) -> ModuleType:
    """An optional library; raises RequestError, which says how to install it, if it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"{purpose} needs {_LIBRARIES[module]}: pip install {_LIBRARIES[module]}") from error
