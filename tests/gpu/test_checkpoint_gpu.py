"""Checkpoints of CUDA weights: the same fingerprints, the same files, and a pause that is short.

Skipped without CUDA. Run: pytest tests/gpu/test_checkpoint_gpu.py
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hogwild.checkpoint import device
from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.fingerprints import fingerprints
from hogwild.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def as_bytes(tensor):
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def weights(tmp_path):
    """A model directory and CUDA views on fused parameters: rows, columns, experts, odd sizes, an odd address."""
    torch.manual_seed(0)
    qkv = torch.randn(3000, 1111, device="cuda").to(torch.bfloat16)
    experts = torch.randn(4, 300, 257, device="cuda")
    odd = torch.randn(100_001, device="cuda").half()
    views = {
        "q": qkv[:1000], "k": qkv[1000:1500], "columns": qkv[:, 3:900], "expert": experts[2, 10:200],
        "part of all experts": experts[:, 20:280], "odd address": odd[1:], "norm": torch.randn(64, device="cuda"),
        "whole": torch.randn(2048, 2048, device="cuda"), "scalar": torch.tensor(2.0, device="cuda"),
    }  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: view.cpu().contiguous() for name, view in views.items()}, source / "model.safetensors")
    return source, views


def test_kernel_computes_xxh3_128():
    for blocks in (1, 7, 8, 1000, 40_000):
        data = torch.randint(0, 256, (blocks * BLOCK,), dtype=torch.uint8, device="cuda")
        out = torch.zeros((blocks, 2), dtype=torch.int64, device="cuda")
        device.hash_blocks(data, out)
        assert (out.cpu().numpy().view(np.uint64) == fingerprints(data.cpu().numpy())).all()


def test_views_of_any_stride_have_the_fingerprints_of_their_bytes(weights, tmp_path):
    source, views = weights
    with CheckpointStore.open(tmp_path / "c", source=source) as store:
        for name, view in views.items():
            assert (
                device.view_fingerprints(store.layout.by_name[name], view) == fingerprints(as_bytes(view).numpy())
            ).all()


@pytest.mark.parametrize("budget", [1 << 30, 3 * BLOCK])
def test_sync_rollback_and_restore(weights, tmp_path, budget):
    source, views = weights
    with CheckpointStore.open(tmp_path / "c", source=source, host_budget=budget) as store:
        assert store.sync(views, weight_version=1).blocks_changed == 0
        states = [{name: view.clone() for name, view in views.items()}]
        for version, share in enumerate((0.001, 0.05, 1.0), 1):
            for view in views.values():
                view.add_((torch.rand(view.shape, device="cuda") < share).to(view.dtype))
            report = store.sync(views, weight_version=version)
            states.append({name: view.clone() for name, view in views.items()})
            assert report.generation == version
            on_disk = load_file(store.directory / "model.safetensors")
            for name, view in views.items():
                assert torch.equal(as_bytes(on_disk[name]), as_bytes(view)), name
            assert store.verify(views).ok
        for target in (1, 0, 3):
            store.rollback(target, views)
            for name, view in views.items():
                assert torch.equal(as_bytes(states[target][name]), as_bytes(view)), name
            assert store.verify(views).ok
    # A checkpoint that was written from a GPU is verified without one
    with CheckpointStore.open(tmp_path / "c") as store:
        assert store.verify({name: view.cpu() for name, view in views.items()}).ok


def test_writes_on_another_stream_are_seen(weights, tmp_path):
    source, views = weights
    with CheckpointStore.open(tmp_path / "c", source=source) as store:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                views["whole"].add_(1.0)
        store.sync(views, weight_version=1)
        assert torch.equal(load_file(store.directory / "model.safetensors")["whole"], views["whole"].cpu())


def test_pause_of_a_gigabyte_is_short(tmp_path):
    """Two passes at a tenth of the memory's speed would already miss this by far."""
    weight = torch.randn(1 << 29, device="cuda").to(torch.bfloat16)
    (tmp_path / "source").mkdir()
    save_file({"w": weight.cpu()}, tmp_path / "source" / "model.safetensors")
    with CheckpointStore.open(tmp_path / "c", source=tmp_path / "source") as store:
        store.prepare({"w": weight})
        store.sync({"w": weight}, weight_version=1)
        weight[: 1 << 22] += 1
        report = store.sync({"w": weight}, weight_version=2)
        assert report.blocks_changed == (1 << 23) // BLOCK
        assert report.pause_seconds < 0.1
