"""A model of eight float64s in a file, trained deterministically: what the fault tests replay."""

import random
import struct
from pathlib import Path

WEIGHTS = 8
_FORMAT = struct.Struct(f"<Q{WEIGHTS}d")


def update(weights: tuple[float, ...], ids: list[int], step: int) -> tuple[float, ...]:
    """One optimizer step: depends on the weights before it and on the order of steps, bit for bit."""
    rng = random.Random(f"{ids}/{step}")
    return tuple(w * (1 - 1e-3) + rng.uniform(-1, 1) * (1 + abs(w)) * 1e-2 for w in weights)


def read_weights(path: Path) -> tuple[int, tuple[float, ...]]:
    """(version, weights)."""
    if not path.exists():
        return 0, (1.0,) * WEIGHTS
    version, *weights = _FORMAT.unpack(path.read_bytes())
    return version, tuple(weights)


def write_weights(path: Path, version: int, weights: tuple[float, ...]) -> None:
    """In the file at once or not at all."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(_FORMAT.pack(version, *weights))
    temporary.replace(path)
