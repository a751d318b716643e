"""The memo gives exactly the fingerprints that looking at every block gives, whatever changes in between."""

import numpy as np
import pytest

from hogwild.checkpoint import memo as module
from hogwild.checkpoint.constants import BLOCK, PIECE
from hogwild.checkpoint.fingerprints import fingerprints
from hogwild.checkpoint.layout import TensorSpec
from hogwild.checkpoint.memo import DENSE, GROUP, PROBE, FingerprintMemo


def spec_of(data: np.ndarray, name: str = "w") -> TensorSpec:
    return TensorSpec(
        name=name, number=0, file="f", offset=0, nbytes=len(data), dtype="U8", shape=(len(data),), first_block=0
    )


@pytest.fixture
def hashed(monkeypatch):
    """Bytes that were looked at by blocks."""
    looked = []

    def spy(data, size=BLOCK):
        if size == BLOCK:
            looked.append(len(data))
        return fingerprints(data, size)

    monkeypatch.setattr(module, "fingerprints", spy)
    return looked


def look(memo: FingerprintMemo, data: np.ndarray, name: str = "w") -> np.ndarray:
    spec = spec_of(data, name)
    memo.begin(spec)
    pieces = range(0, len(data), PIECE)
    return np.concatenate(
        [memo.fingerprints(spec, start // BLOCK, data[start : start + PIECE]).copy() for start in pieces]
    )


@pytest.mark.parametrize("length", [1, BLOCK, GROUP * BLOCK, 3 * GROUP * BLOCK + 5 * BLOCK + 17, PIECE + 70_000])
def test_equal_to_looking_at_every_block(length):
    rng = np.random.default_rng(length)
    data = rng.integers(0, 256, length, np.uint8)
    memo = FingerprintMemo()
    for round_ in range(60):
        assert np.array_equal(look(memo, data), fingerprints(data))
        # dense, sparse and no changes in turn, for long enough to go into and out of the dense mode
        if round_ % 30 < 12:
            data += 1
        elif round_ % 3:
            data[rng.integers(0, length, 1 + length // 100_000)] ^= 1


def test_unchanged_groups_are_not_looked_at_by_blocks(hashed):
    data = np.random.default_rng(0).integers(0, 256, 2 * PIECE, np.uint8)
    memo = FingerprintMemo()
    look(memo, data)
    hashed.clear()
    look(memo, data)
    assert not hashed
    data[PIECE + 5 * GROUP * BLOCK] ^= 1
    look(memo, data)
    assert hashed == [GROUP * BLOCK]


def test_dense_tensors_are_hashed_once_and_tried_again_later(hashed):
    data = np.random.default_rng(0).integers(0, 256, PIECE, np.uint8)
    memo = FingerprintMemo()
    modes = []
    for _ in range(3 * PROBE):
        data += 1
        look(memo, data)
        modes.append(memo._seen["w", len(data)].skip > 0)
    assert modes.count(True) > 0.6 * len(modes)
    # When changes become rare again, groups are used again
    for _ in range(PROBE + 3):
        look(memo, data)
    hashed.clear()
    data[0] ^= 1
    look(memo, data)
    assert hashed == [GROUP * BLOCK]
    assert DENSE < 1


def test_tensors_do_not_mix(hashed):
    a, b = (np.full(GROUP * BLOCK * 2, value, np.uint8) for value in (1, 2))
    memo = FingerprintMemo()
    for _ in range(3):
        for name, data in (("a", a), ("b", b)):
            assert np.array_equal(look(memo, data, name), fingerprints(data))
