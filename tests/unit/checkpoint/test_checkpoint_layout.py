"""safetensors headers are read strictly: what is read there is later written to."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.layout import Layout, read_header
from hogwild.errors import CheckpointLayout


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def test_offsets_are_where_safetensors_puts_the_tensors(model):
    layout = Layout.read(model.directory)
    for spec in layout.tensors:
        path = model.directory / spec.file
        with safe_open(path, "pt") as reader:
            expected = reader.get_tensor(spec.name)
        data = path.read_bytes()[spec.offset : spec.offset + spec.nbytes]
        assert data == bytes(expected.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert tuple(expected.shape) == spec.shape


def test_blocks_are_numbered_without_gaps(model):
    layout = Layout.read(model.directory)
    expected = 0
    for number, spec in enumerate(layout.tensors):
        assert (spec.number, spec.first_block) == (number, expected)
        assert spec.block_bytes(0, spec.blocks) == spec.nbytes
        expected += -(-spec.nbytes // BLOCK)
    assert layout.blocks == expected


def test_id_names_the_layout_not_the_contents(model, tmp_path, helpers):
    same = helpers.build_model(tmp_path / "same")
    layout = Layout.read(model.directory)
    assert Layout.read(same.directory).id == layout.id
    (same.directory / "model-00002-of-00002.safetensors").write_bytes(
        raw({"head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    )
    (same.directory / "model.safetensors.index.json").unlink()
    (same.directory / "model-00001-of-00002.safetensors").unlink()
    assert Layout.read(same.directory).id != layout.id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01", "too short"),
        (raw(GOOD, bytes(24), length=10**9), "does not fit"),
        (raw(GOOD, bytes(24), length=2**63), "does not fit"),
        (raw(b"{nonsense", bytes(24)), "not valid JSON"),
        (raw(b"[" * 50_000), "not valid JSON"),
        (raw(b"\xff\xfe{}"), "not valid JSON"),
        (raw([1, 2]), "not an object"),
        (raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', bytes(4)), "occurs twice"),
        (raw({"a": 3}), "malformed"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "malformed"),
        (raw({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, bytes(4)), "dtype 'F4'"),
        (raw({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "not a natural number"),
        (raw({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)), "not a natural number"),
        (raw({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)), "not a natural number"),
        (raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "its shape .* needs 12"),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "starts at byte 4"),
        (
            raw(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                },
                bytes(12),
            ),
            "b starts at byte 4 of the data, expected 8",
        ),
        (raw(GOOD, bytes(23)), "the tensors end at byte"),
        (raw(GOOD, bytes(25)), "the tensors end at byte"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointLayout, match=message):
        read_header(path)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_no_header_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(content) - 4)) + content)
    with contextlib.suppress(CheckpointLayout):
        read_header(path)


def test_which_files_count(tmp_path):
    with pytest.raises(CheckpointLayout, match="is not a directory"):
        Layout.read(tmp_path / "missing")
    with pytest.raises(CheckpointLayout, match="has no safetensors file"):
        Layout.read(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert [file.name for file in Layout.read(tmp_path).files] == ["consolidated.safetensors"]
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert [file.name for file in Layout.read(tmp_path).files] == ["model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointLayout, match="2 safetensors files and no index"):
        Layout.read(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {"w": "missing.safetensors"}}', "names the shard 'missing.safetensors'"),
        ('{"weight_map": {"w": "../a.safetensors"}}', "names the shard"),
        ('{"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}', "x is in b.safetensors, but it is not"),
        ('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}', None),
    ],
)
def test_indexes(tmp_path, index, message):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"v": torch.zeros(2)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    if message is None:
        assert [spec.name for spec in Layout.read(tmp_path).tensors] == ["w", "v"]
        return
    with pytest.raises(CheckpointLayout, match=message):
        Layout.read(tmp_path)


def test_ambiguous_directories_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors", "": "b.safetensors"}}')
    with pytest.raises(CheckpointLayout, match="w is both in"):
        Layout.read(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    with pytest.raises(CheckpointLayout, match="loaders disagree"):
        Layout.read(tmp_path)
