"""Hogwild trains a language model while vLLM serves it.

Public names: `Client` and `AsyncClient` (the API's clients), `Settings`, and the errors of `hogwild.errors`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hogwild.client import AsyncClient, Client
    from hogwild.config import Settings

__all__ = ["AsyncClient", "Client", "Settings", "__version__"]

try:
    __version__ = version("hogwild")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0.1.0"

_HOME = {"AsyncClient": "hogwild.client", "Client": "hogwild.client", "Settings": "hogwild.config"}


def __getattr__(name: str) -> Any:
    """Public names on first use: vLLM imports this package in every process, and needs none of them there."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
