"""The manifest against everything that could be in that file: every view is inside its memory, or a clear error."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from hogwild.errors import ExporterGone, ManifestError
from hogwild.gpu_worker.lifecycle import Lifecycle
from hogwild.manifest import Allocation, Manifest, Refusal, TensorRecord, manifest_path, refusal_path, sweep
from hogwild.runtime_files import boot_id, private_dir, process_alive, process_start_time
from hogwild.strided import span
from hogwild.weight_state import FILE_NAME, WeightState

HUGE = 10**400  # too large for a float


def make(**changes: Any) -> Manifest:
    pid = os.getpid()
    fields: dict[str, Any] = {
        "export_id": "ab" * 16, "model_path": "/models/tiny", "served_model_name": "tiny", "vllm_version": "0.32.0",
        "pid": pid, "process_start_time": process_start_time(pid), "boot_id": boot_id(), "device": "cpu",
        "max_model_len": 128, "vocab_size": 250, "dtype": "float32", "created_at": time.time(),
        "allocations": (Allocation(kind="memfd", size=4096, pid=pid, fd=3, inode=7),),
        "tensors": {
            "a": TensorRecord(status="shared", shape=(4, 8), stride=(8, 1), dtype="float32", allocation=0, offset=0,
                              parameter="qkv", hash="0" * 32, full_shape=(4, 8)),
            "b": TensorRecord(status="shared", shape=(2, 8), stride=(16, 1), dtype="float32", allocation=0, offset=128,
                              parameter="qkv", slices=((0, 2, 2),), full_shape=(4, 8)),
            "c": TensorRecord(status="derived", shape=(4,), dtype="bfloat16", reason="cast"),
        },
        **changes,
    }  # fmt: skip
    return Manifest(**fields)


def data(manifest: Manifest | None = None) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((manifest or make()).to_json())
    return loaded


def load(value: Any) -> Manifest:
    return Manifest.from_json(json.dumps(value))


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = make()
    manifest.write(tmp_path / "rank0.json")
    assert Manifest.load(tmp_path / "rank0.json") == manifest
    assert (tmp_path / "rank0.json").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "rank0.json"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is vLLM running with the hogwild plugin"):
        Manifest.load(tmp_path / "rank0.json")


def test_readable_by_others(tmp_path: Path) -> None:
    make().write(tmp_path / "rank0.json")
    (tmp_path / "rank0.json").chmod(0o644)
    with pytest.raises(ManifestError, match="mode 0644"):
        Manifest.load(tmp_path / "rank0.json")


def test_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().write(tmp_path / "rank0.json")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ManifestError, match="belongs to user"):
        Manifest.load(tmp_path / "rank0.json")
    with pytest.raises(ManifestError, match="belongs to user"):
        private_dir(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    make().write(tmp_path / "real.json")
    (tmp_path / "rank0.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(ManifestError, match="can't open"):
        Manifest.load(tmp_path / "rank0.json")


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rank0.json", 0o600)
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path / "rank0.json")


@pytest.mark.parametrize("cut", [0, 1, 10, 100, -1])
def test_truncated(cut: int, tmp_path: Path) -> None:
    text = make().to_json()
    with pytest.raises(ManifestError, match="truncated or not JSON"):
        Manifest.from_json(text[:cut])


def test_deeply_nested() -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json("[" * 100_000)


def test_another_version_says_what_to_do() -> None:
    value = data()
    value["__metadata__"]["format_version"] = 2
    with pytest.raises(ManifestError, match="same version"):
        load(value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 4096 - 64, "ends at byte"),
        ("offset", 2, "not a multiple"),
        ("offset", -4, "offset must be an integer"),
        ("offset", 1 << 80, "offset must be an integer"),
        ("offset", True, "offset must be an integer"),
        ("offset", 1.0, "offset must be an integer"),
        ("stride", [1 << 55, 1], "ends at byte"),
        ("stride", [-8, 1], "stride must be an integer"),
        ("stride", [0, 1], "several elements in one place"),
        ("stride", [8], "2 dimensions but 1 strides"),
        ("shape", [4, 1 << 50], "ends at byte"),
        ("shape", [1 << 40, 1 << 40], "too large"),
        ("shape", [1] * 9, "at most 8"),
        ("shape", "4,8", "must be a list"),
        ("allocation", 1, "allocation must be an integer"),
        ("allocation", None, "has no allocation"),
        ("dtype", "object", "unknown dtype"),
        ("dtype", "__class__", "unknown dtype"),
        ("status", "trusted", "is none of"),
        ("hash", "xyz", "32 hexadecimal"),
        ("slices", [[0, 2, 3]], "does not fit"),
        ("slices", [[7, 0, 4]], "slice is"),
        ("full_shape", [8, 8], "no slices"),
        ("full_shape", [4, 8, 1], "no slices"),
        ("shape", [2, 8], "no slices"),
    ],
)
def test_a_tensor_that_lies(field: str, value: Any, message: str) -> None:
    changed = data()
    changed["tensors"]["a"][field] = value
    with pytest.raises(ManifestError, match=message):
        load(changed)


@pytest.mark.parametrize("slices", [[], [[1, 0, 8]], [[0, 2, 2], [0, 2, 2]]])
def test_slices_that_do_not_make_the_part(slices: Any) -> None:
    changed = data()
    changed["tensors"]["b"]["slices"] = slices
    with pytest.raises(ManifestError, match="don't make shape"):
        load(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("export_id", "../../etc"), ("pid", 0), ("pid", -1), ("pid", "1"), ("device", "tpu"), ("device", "cuda"),
        ("tensor_parallel_rank", 1), ("tensor_parallel_size", 0), ("vocab_size", 0), ("max_model_len", None),
        ("process_start_time", "now"), ("trust_remote_code", 1), ("model_path", "a\0b"), ("boot_id", 3),
        ("process_start_time", HUGE), ("created_at", HUGE), ("created_at", -HUGE), ("pid", HUGE),
    ],
)  # fmt: skip
def test_metadata_that_lies(field: str, value: Any) -> None:
    changed = data()
    changed["__metadata__"][field] = value
    with pytest.raises(ManifestError):
        load(changed)


@pytest.mark.parametrize(
    "allocation",
    [
        {"kind": "shm", "size": 4096}, {"kind": "memfd", "size": 0, "pid": os.getpid(), "fd": 3, "inode": 7},
        {"kind": "memfd", "size": 4096, "pid": 1, "fd": 3, "inode": 7},
        {"kind": "cuda_ipc", "size": 4096, "handle": "00" * 64}, [], None,
    ],
)  # fmt: skip
def test_an_allocation_that_lies(allocation: Any) -> None:
    changed = data()
    changed["allocations"][0] = allocation
    with pytest.raises(ManifestError):
        load(changed)


def test_a_damaged_cuda_handle_is_not_shown_to_cuda() -> None:
    handle = bytes(range(64)).hex()
    changed = data()
    changed["__metadata__"].update(device="cuda", gpu_uuid="GPU-1")
    good = {"kind": "cuda_ipc", "size": 1 << 20, "handle": handle, "crc32": 0x100ECE8C}
    changed["allocations"] = [good] * len(changed["allocations"])
    assert load(changed).allocations[0].handle == handle
    assert json.loads(load(changed).to_json())["allocations"] == changed["allocations"]
    for lie in ({"handle": "ff" + handle[2:]}, {"crc32": 1}, {"crc32": None}):
        changed["allocations"] = [{**good, **lie}] * len(changed["allocations"])
        with pytest.raises(ManifestError, match="damaged"):
            load(changed)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.sampled_from([HUGE, -HUGE]), st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 10), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += places(item, (*path, key))
    return found


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_hostile_manifest_is_a_clear_error_or_a_safe_one(source: Any) -> None:
    """Any value anywhere, several at once: whatever still loads has every view within its allocation."""
    document = spoiled(data(), source)
    try:
        manifest = load(document)
    except ManifestError as error:
        assert error.message
        return
    for record in manifest.tensors.values():
        if record.allocation is not None:
            size = manifest.allocations[record.allocation].size
            item = 4 if record.dtype == "float32" else 2
            if record.dtype in ("float32", "bfloat16"):
                assert record.offset >= 0
                assert record.offset + span(record.shape, record.stride) * item <= size


def spoiled(document: Any, source: Any) -> Any:
    """Any value anywhere, several at once."""
    document = copy.deepcopy(document)
    for _ in range(source.draw(st.integers(1, 3))):
        path = source.draw(st.sampled_from(places(document)))
        where = document
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = source.draw(scalars)
    return document


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.data(), st.binary(max_size=200), scalars))
def test_a_hostile_refusal_is_a_clear_error_or_a_refusal(source: Any) -> None:
    """And whoever waits for vLLM goes on waiting."""
    with tempfile.TemporaryDirectory() as folder:
        path = refusal_path(Path(folder))
        refusal().write(path)
        if isinstance(source, bytes):
            path.write_bytes(source)
        elif isinstance(source, DataObject):
            path.write_text(json.dumps(spoiled(json.loads(path.read_text()), source)))
        else:
            path.write_text(json.dumps(source))
        try:
            read = Refusal.load(path)
        except ManifestError as error:
            assert error.message
        else:
            assert read is None or read.pid == os.getpid()
        waiting = Lifecycle(Path(folder), on_attached=lambda _: None, on_lost=lambda _: None)
        assert waiting.poll() == "detached"
        sweep(Path(folder))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_clear_error(text: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


@settings(max_examples=200, deadline=None)
@given(st.recursive(scalars, lambda inner: st.dictionaries(st.text(max_size=12), inner, max_size=3), max_leaves=8))
def test_arbitrary_json_is_a_clear_error(value: Any) -> None:
    with pytest.raises(ManifestError):
        load(value)


# --- life and death --------------------------------------------------------------------------------------------------


def test_a_reused_pid_is_another_process() -> None:
    manifest = make(process_start_time=process_start_time(os.getpid()) - 60)
    assert not manifest.exporter_alive()
    with pytest.raises(ExporterGone, match="not running any more"):
        manifest.check_alive()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times come from /proc")
def test_setting_the_clock_changes_nobodys_start(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, real = make(), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    assert manifest.exporter_alive()


def test_a_start_since_1970_as_older_files_have_it() -> None:
    started = psutil.Process().create_time()
    assert process_alive(os.getpid(), started)
    assert not process_alive(os.getpid(), started - 60)


def test_a_process_that_only_waits_to_be_reaped_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL) as child:
        started = process_start_time(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process_alive(child.pid, started)


def test_another_boot_is_another_machine() -> None:
    with pytest.raises(ExporterGone, match="last restart"):
        make(boot_id="another").check_alive()


def test_a_living_exporter_is_alive() -> None:
    make().check_alive()


def test_sweep_takes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    # Given the remains of a vLLM that was killed
    make(process_start_time=1.0).write(manifest_path(tmp_path))
    WeightState.create(tmp_path / FILE_NAME, "ab" * 16).close()
    (tmp_path / "frontend.json").write_text(json.dumps({"pid": os.getpid(), "process_start_time": 1.0}))

    gone = sweep(tmp_path)

    assert {path.name for path in gone} == {"rank0.json", FILE_NAME, "frontend.json"}
    assert list(tmp_path.iterdir()) == []

    # Given a living one
    make().write(manifest_path(tmp_path))
    WeightState.create(tmp_path / FILE_NAME, "ab" * 16).close()
    front = {"pid": os.getpid(), "process_start_time": process_start_time(os.getpid())}
    (tmp_path / "frontend.json").write_text(json.dumps(front))
    assert sweep(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_sweep_spares_the_state_of_a_vllm_that_is_just_starting(tmp_path: Path) -> None:
    make(process_start_time=1.0).write(manifest_path(tmp_path))
    WeightState.create(tmp_path / FILE_NAME, "cd" * 16).close()
    assert [path.name for path in sweep(tmp_path)] == ["rank0.json"]
    assert (tmp_path / FILE_NAME).exists()


def refusal(**changes: Any) -> Refusal:
    pid = os.getpid()
    fields: dict[str, Any] = {
        "reasons": (("quantised", "the weights are quantised (fp8)"),), "served_model_name": "tiny", "pid": pid,
        "vllm_version": "0.32.0", "process_start_time": process_start_time(pid), "boot_id": boot_id(), **changes,
    }  # fmt: skip
    return Refusal(**fields)


def test_a_refusal_tells_why_while_its_vllm_runs(tmp_path: Path) -> None:
    assert Refusal.load(refusal_path(tmp_path)) is None
    refusal().write(refusal_path(tmp_path))
    assert Refusal.load(refusal_path(tmp_path)) == refusal()
    refusal_path(tmp_path).write_text("{}")
    with pytest.raises(ManifestError, match="not a refusal"):
        Refusal.load(refusal_path(tmp_path))


def test_the_refusal_of_a_dead_vllm_counts_for_nothing(tmp_path: Path) -> None:
    refusal(process_start_time=1.0).write(refusal_path(tmp_path))
    assert Refusal.load(refusal_path(tmp_path)) is None


@pytest.mark.parametrize("start", ["1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_no_clock_shows(start: str, tmp_path: Path) -> None:
    name = '"process_start_time": '
    text = make().to_json()
    before = name + json.dumps(json.loads(text)["__metadata__"]["process_start_time"])
    with pytest.raises(ManifestError, match="process_start_time"):
        Manifest.from_json(text.replace(before, name + start))
    refusal().write(refusal_path(tmp_path))
    path = refusal_path(tmp_path)
    path.write_text(path.read_text().replace(before, name + start).replace(f'"pid": {os.getpid()}', '"pid": 1e999'))
    with pytest.raises(ManifestError, match="not a refusal"):
        Refusal.load(path)
    assert sweep(tmp_path) == [path]


def test_a_worker_waits_beside_a_damaged_refusal(tmp_path: Path) -> None:
    refusal().write(refusal_path(tmp_path))
    refusal_path(tmp_path).write_text("{")
    waiting = Lifecycle(tmp_path, on_attached=lambda _: None, on_lost=lambda _: None)
    assert waiting.poll() == "detached"
    assert "can't be read" in waiting.reason
