"""Blocks of live views are those of their contiguous bytes, whatever fusion vLLM made of the parameter."""

import numpy as np
import pytest
import torch

from hogwild.checkpoint.constants import BLOCK, PIECE
from hogwild.checkpoint.fingerprints import fingerprints
from hogwild.checkpoint.layout import TensorSpec
from hogwild.checkpoint.views import flat_bytes, pieces, take_blocks, view_fingerprints, write_blocks


def views():
    torch.manual_seed(0)
    qkv = torch.randn(300, 257).to(torch.bfloat16)
    experts = torch.randn(5, 64, 128)
    return {
        "whole": qkv,
        "rows of a fused parameter": qkv[37:180],
        "columns": qkv[:, 11:200],
        "transposed": qkv.t(),
        "every second row": qkv[::2],
        "one expert of w13": experts[2, 10:40],
        "the same part of all experts": experts[:, 10:40],
        "column part of all experts": experts[:, :, 5:90],
        "expert transposed": experts.transpose(1, 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "one element of many": qkv[5:6, 7:8],
        "uint8 column": torch.randint(0, 256, (9000, 2), dtype=torch.uint8)[:, 1],
        "bool": torch.rand(5000) > 0.5,
        "float16 column": torch.randn(4097, 3).half()[:, 1],
        "rows of exactly a block, strided": torch.randn(40, 2048)[:, :1024],
        "parameter with a gradient": torch.nn.Parameter(torch.randn(2000)),
    }


def reference(view: torch.Tensor) -> np.ndarray:
    return view.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def spec_of(view: torch.Tensor) -> TensorSpec:
    nbytes = view.numel() * view.element_size()
    return TensorSpec(
        name="w", number=0, file="f", offset=0, nbytes=nbytes, dtype="F32", shape=tuple(view.shape), first_block=0
    )


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("limit", [BLOCK, 4 * BLOCK, PIECE])
def test_pieces_are_the_contiguous_bytes_in_order(name, limit):
    view = views()[name]
    data, position = [], 0
    for offset, part in pieces(view, limit):
        assert offset == position
        assert offset % BLOCK == 0
        data.append(flat_bytes(part).numpy().copy())
        position += len(data[-1])
    joined = np.concatenate(data) if data else np.empty(0, np.uint8)
    assert np.array_equal(joined, reference(view))


@pytest.mark.parametrize("name", views())
def test_fingerprints_of_a_view_are_those_of_its_bytes(name):
    view = views()[name]
    assert np.array_equal(view_fingerprints(spec_of(view), view), fingerprints(reference(view)))


@pytest.mark.parametrize("name", [name for name in views() if name != "empty"])
def test_blocks_are_written_in_place_and_nothing_else(name):
    view = views()[name]
    target = view.detach()
    old = reference(view).copy()
    new = np.random.default_rng(1).integers(0, 2, len(old), np.uint8)  # 0 and 1: valid for bool too
    blocks = np.arange(0, -(-len(old) // BLOCK), 2, dtype=np.int64)
    storage = torch.empty(0, dtype=torch.uint8).set_(target.untyped_storage())
    before = storage.clone()

    def read(numbers):
        return np.concatenate([new[number * BLOCK : (number + 1) * BLOCK] for number in numbers.tolist()])

    # When
    write_blocks(spec_of(view), view, blocks, read)
    # Then the chosen blocks are new, the others old
    expected = old.copy()
    for block in blocks.tolist():
        expected[block * BLOCK : (block + 1) * BLOCK] = new[block * BLOCK : (block + 1) * BLOCK]
    assert np.array_equal(reference(view), expected)
    # ... and what lies in the storage between the view's elements was not touched
    mask = torch.zeros_like(storage)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[target.element_size()]
    inside = torch.empty(0, dtype=integers)
    inside.set_(mask.untyped_storage(), target.storage_offset(), target.shape, target.stride()).fill_(-1)
    assert bool((mask == 0).any()) == (target.untyped_storage().nbytes() > len(old))
    assert torch.equal(storage[mask == 0], before[mask == 0])


def test_take_blocks_knows_the_short_last_block():
    data = np.arange(3 * BLOCK + 5, dtype=np.uint64).astype(np.uint8)
    out = np.empty(BLOCK + 5, np.uint8)
    take_blocks(data, np.array([1, 3]), out)
    assert np.array_equal(out, np.concatenate([data[BLOCK : 2 * BLOCK], data[3 * BLOCK :]]))
    out = np.empty(5, np.uint8)
    take_blocks(data, np.array([3]), out)
    assert np.array_equal(out, data[3 * BLOCK :])
