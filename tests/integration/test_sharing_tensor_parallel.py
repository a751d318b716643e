"""Two tensor-parallel ranks of vLLM's loader: their manifests tile every checkpoint tensor, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

from hogwild.errors import AttachRefused
from hogwild.gpu_worker.attach import attach, open_views
from hogwild.manifest import Manifest, manifest_path

pytest.importorskip("vllm")
RANK = Path(__file__).parent / "support" / "vllm_rank.py"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused and row-parallel matrices, biases, an embedding whose rows don't divide by two ranks and their padding."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=251, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tp"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runtime_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), "2", str(base / "store"), str(checkpoint), str(base / "runtime")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.strip() == "exported" for line in lines), "the rank did not load"
    yield base / "runtime" / "tp"
    for process in processes:
        process.communicate(timeout=120)  # closes their input: they end in good order, and their own memory goes


def test_the_slices_of_two_ranks_tile_every_tensor(checkpoint: Path, runtime_dir: Path) -> None:
    manifests = [Manifest.load(manifest_path(runtime_dir, rank)) for rank in range(2)]
    wanted = load_file(checkpoint / "model.safetensors")
    split = whole = 0
    with open_views(manifests[0]) as first, open_views(manifests[1]) as second:
        for name, tensor in wanted.items():
            records = [manifest.tensors[name] for manifest in manifests]
            assert [record.status for record in records] == ["shared", "shared"], (name, records[0].reason)
            if records[0].slices is None:
                whole += 1
                assert torch.equal(first[name], tensor)
                assert torch.equal(second[name], tensor)
                continue
            split += 1
            covered = torch.zeros(tensor.shape, dtype=torch.int)
            for record, view in zip(records, (first[name], second[name]), strict=True):
                part: tuple[slice, ...] = (slice(None),) * tensor.dim()
                for dim, start, length in record.slices or ():
                    part = (*part[:dim], slice(start, start + length), *part[dim + 1 :])
                covered[part] += 1
                assert torch.equal(view, tensor[part])
            assert covered.eq(1).all(), name
        first.clear()
        second.clear()
    assert split == 2 * (3 * 2 + 1 + 3) + 2  # q, k, v with biases, o, gate, up, down in two layers; embedding and head
    assert whole == 2 * 2 + 1  # norms


def test_both_ranks_belong_to_one_export(runtime_dir: Path) -> None:
    first, second = (Manifest.load(manifest_path(runtime_dir, rank)) for rank in range(2))
    assert first.export_id == second.export_id
    assert (first.tensor_parallel_rank, second.tensor_parallel_rank) == (0, 1)
    assert first.pid != second.pid


def test_the_worker_refuses_until_it_can_train_across_ranks(runtime_dir: Path) -> None:
    with pytest.raises(AttachRefused, match="--tensor-parallel-size 1"):
        attach(runtime_dir)
