"""A tiny model on disk, live views on it with every kind of stride, and files that do not wait for the disk."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.store import CheckpointStore


class FastHandle(Handle):
    """A handle without fsync."""

    def fsync(self) -> None:
        """Not needed: no test pulls the plug of the machine it runs on."""


class FastIo(FileIo):
    """Real files without waiting for the disk."""

    def create(self, path: Path, mode: int = 0o644) -> Handle:
        return FastHandle(path, super().create(path, mode).fd)

    def open(self, path: Path, *, write: bool = False) -> Handle:
        return FastHandle(path, super().open(path, write=write).fd)

    def fsync_dir(self, path: Path) -> None:
        pass


@dataclass
class TinyModel:
    """A sharded checkpoint and the live weights that were loaded from it."""

    directory: Path
    views: dict[str, torch.Tensor]
    fused: torch.Tensor = field(repr=False)

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: view.clone() for name, view in self.views.items()}


def weights_on_disk(directory: Path) -> dict[str, torch.Tensor]:
    """What a loader of Hugging Face models would read."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bit for bit: NaN equals NaN, and -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert torch.equal(as_bytes(a[name]), as_bytes(b[name])), name


@pytest.fixture
def io() -> FileIo:
    return FastIo()


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    """Two shards; bf16, fp16, fp32; whole and short last blocks, tensors below a block, a scalar, an empty one."""
    return build_model(tmp_path / "model")


def build_model(directory: Path) -> TinyModel:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    directory.mkdir()
    first = {
        "embed.weight": random(96, 128, dtype=torch.bfloat16),  # 6 blocks
        "layer.q.weight": random(48, 64, dtype=torch.bfloat16),  # a row range of the fused parameter, 1.5 blocks
        "layer.down.weight": random(64, 33, dtype=torch.bfloat16),  # a column range: rows of 66 bytes with gaps
        "norm.weight": random(64, dtype=torch.float32),  # below a block
    }
    second = {
        "head.weight": random(96, 64, dtype=torch.float32),  # 6 blocks
        "half.weight": random(50, 50, dtype=torch.float16),
        "scale": random(1, dtype=torch.float32).reshape(()),
        "empty": torch.empty(0, 4, dtype=torch.float32),
        "rotary.inv_freq": random(16, dtype=torch.float32),  # in the file, but not live
    }
    for name, tensors in (("model-00001-of-00002", first), ("model-00002-of-00002", second)):
        save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"stale weights in another format")
    views = {name: tensor.clone() for name, tensor in (first | second).items() if name != "rotary.inv_freq"}
    fused = torch.zeros(100, 64, dtype=torch.bfloat16)
    fused[10:58] = views["layer.q.weight"]
    views["layer.q.weight"] = fused[10:58]
    wide = torch.zeros(64, 100, dtype=torch.bfloat16)
    wide[:, 20:53] = views["layer.down.weight"]
    views["layer.down.weight"] = wide[:, 20:53]
    return TinyModel(directory, views, fused)


@pytest.fixture
def store(model: TinyModel, tmp_path: Path, io: FileIo):
    """A checkpoint that starts as a clone of the model."""
    with CheckpointStore.open(tmp_path / "checkpoint", source=model.directory, io=io) as opened:
        yield opened


@pytest.fixture
def helpers():
    """Functions for tests, which can't import a conftest."""

    class Helpers:
        weights_on_disk = staticmethod(weights_on_disk)
        assert_equal = staticmethod(assert_equal)
        build_model = staticmethod(build_model)
        FastIo = FastIo
        FastHandle = FastHandle

    return Helpers
