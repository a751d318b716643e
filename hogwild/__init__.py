"""Hogwild trains a language model while vLLM serves it.

Public names: `Client`, `AsyncClient`, `Settings` and the errors of `hogwild.errors`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hogwild")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0.1.0"
