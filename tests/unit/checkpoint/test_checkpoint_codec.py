"""Differences and fingerprints: exact for every bit pattern, and the same value on every device."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hogwild.checkpoint.codec import decode_delta, encode_delta
from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.fingerprints import differing, fingerprints, table_digest
from hogwild.errors import CheckpointCorrupt


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 600), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_delta_leads_back_for_any_bit_pattern(width, elements, random):
    old = np.frombuffer(random.randbytes(width * elements), np.uint8)
    new = np.frombuffer(random.randbytes(width * elements), np.uint8).copy()
    if elements and random.random() < 0.5:
        new[:] = old
        new[random.randrange(len(new)) :] ^= 1
    assert np.array_equal(decode_delta(encode_delta(old, new, width), new, width), old)


def test_delta_is_zigzag_of_the_integer_difference():
    """Against the definition, element by element, in plain Python integers."""
    import zstandard

    old = np.array([0x3F80, 0x3F80, 0xFFFF, 0, 7], "<u2")
    new = np.array([0x3F7F, 0x3F81, 0, 0xFFFF, 7], "<u2")
    expected = []
    for a, b in zip(old.tolist(), new.tolist(), strict=True):
        d = (b - a) & 0xFFFF
        d -= 0x10000 if d >> 15 else 0
        expected.append(2 * d if d >= 0 else -2 * d - 1)
    planes = zstandard.ZstdDecompressor().decompress(encode_delta(old.view(np.uint8), new.view(np.uint8), 2))
    assert list(planes) == [value & 0xFF for value in expected] + [value >> 8 for value in expected]


def test_small_updates_compress_well():
    torch.manual_seed(0)
    old = torch.randn(1 << 19).mul(0.02).to(torch.bfloat16)
    new = old.clone()
    touched = torch.rand(old.shape) < 0.1
    new.view(torch.int16)[touched] += 1
    old_bytes, new_bytes = (tensor.view(torch.uint8).numpy() for tensor in (old, new))
    assert len(encode_delta(old_bytes, new_bytes, 2)) < old_bytes.nbytes / 10


@pytest.mark.parametrize("payload", [b"", b"nonsense", encode_delta(np.zeros(8, np.uint8), np.zeros(8, np.uint8), 2)])
def test_damaged_payload(payload):
    with pytest.raises(CheckpointCorrupt):
        decode_delta(payload, np.zeros(4096, np.uint8), 2)


@pytest.mark.parametrize("length", [0, 1, 4, 4095, 4096, 4097, 20000])
def test_fingerprints_are_xxh3_128_of_each_block(length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    table = fingerprints(data)
    assert len(table) == -(-length // BLOCK)
    for row, start in zip(table.tolist(), range(0, length, BLOCK), strict=True):
        assert row[0] | row[1] << 64 == xxhash.xxh3_128_intdigest(data[start : start + BLOCK].tobytes())


def test_differing_looks_at_both_halves():
    a = np.array([[1, 2], [3, 4], [5, 6]], np.uint64)
    b = np.array([[1, 2], [9, 4], [5, 9]], np.uint64)
    assert differing(a, b).tolist() == [1, 2]
    assert table_digest(a) != table_digest(b)


KERNEL = """
import numpy as np, torch
from hogwild.checkpoint.device import hash_blocks
from hogwild.checkpoint.fingerprints import fingerprints
for blocks in (1, 8, 19):
    data = torch.from_numpy(np.random.default_rng(blocks).integers(0, 256, blocks * 4096, np.uint8))
    data[:2048] = 0 if blocks == 8 else 255
    out = torch.zeros((blocks, 2), dtype=torch.int64)
    hash_blocks(data, out)
    assert (out.numpy().view(np.uint64) == fingerprints(data.numpy())).all()
print("equal")
"""

STAGING = """
import contextlib, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from hogwild.checkpoint import device, views as live
from hogwild.checkpoint.blockfile import file_table
from hogwild.checkpoint.durable import OS_IO
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.memo import FingerprintMemo
from hogwild.checkpoint.stage import Arena, Stage

torch.cuda.synchronize = lambda *_: None  # the only things here that want a GPU
torch.cuda.device = lambda *_: contextlib.nullcontext()
torch.manual_seed(0)
fused = torch.randn(80, 300).bfloat16()
odd = torch.randn(5001).half()
views = {"rows": fused[5:60], "columns": fused[:, 7:200], "odd address": odd[1:], "scalar": torch.tensor(1.5),
         "whole": torch.randn(64, 128), "same": torch.randn(2000), "empty": torch.empty(0, 3)}
root = Path(sys.argv[1])
save_file({name: view.contiguous().clone() for name, view in views.items()}, root / "model.safetensors")
layout = Layout.read(root)
table = file_table(OS_IO, root, layout)
for name, view in views.items():
    spec = layout.by_name[name]
    assert (device.view_fingerprints(spec, view) == live.view_fingerprints(spec, view)).all()
fused[5:8] += 1
fused[50:, 100] -= 1
odd[-1] += 1
views["scalar"].zero_()
views["whole"][::20] += 1
for budget in (1 << 24, 3 * 4096):
    found = []
    for where, arguments in ((live, [FingerprintMemo()]), (device, [])):
        arena = Arena(budget)
        if where is device:
            device.reserve(views, arena)
        reserved = arena.allocated
        assert (reserved > 0) == (where is device)
        stage = Stage(arena, OS_IO, root / where.__name__)
        where.stage_changed(layout, views, table, stage, *arguments)
        # What the pause takes anew is for the blocks' contents alone.
        assert arena.allocated - reserved == sum(map(len, arena._chunks)), arena.allocated
        frames = sorted(stage.frames, key=lambda frame: (frame.spec.number, frame.blocks[0]))
        found.append([(f.spec.name, f.blocks.tolist(), f.table.tolist(), stage.read(f).tobytes()) for f in frames])
    assert found[0] == found[1] and len({frame[0] for frame in found[0]}) == 5, [frame[:2] for frame in found[0]]
print("equal")
"""


COMPILES = """
import os
del os.environ["TRITON_INTERPRET"]
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hogwild.checkpoint import device

constants = {"start_low": -1, "start_high": 1 << 62, "PRIME32_1": device._P32_1, "AVALANCHE": 0x165667919E3779F9,
             "N": device.BLOCKS_PER_PROGRAM}
signature = dict.fromkeys(("data", "consts", "out"), "*i64") | {"blocks": "i32"} | dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=device._xxh3_128, signature=signature, constexprs=constants)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": device.WARPS})
assert len(kernel.asm["cubin"]) > 1000
print("equal")
"""


@pytest.mark.timeout(610)
@pytest.mark.parametrize("code", [KERNEL, STAGING, COMPILES], ids=["kernel", "staging", "compiles for Hopper"])
def test_what_cuda_would_do(code, tmp_path):
    """The Triton kernel and the staging of CUDA weights, run by Triton's interpreter, against library and CPU path."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.stdout == "equal\n", done.stderr
