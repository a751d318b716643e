"""Full disks, foreign hands, second writers, readers in the way, damaged files: clear errors, and nothing lost."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hogwild.checkpoint import history, records
from hogwild.checkpoint import source as source_module
from hogwild.checkpoint.durable import FileIo, FileLock, Handle
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointForeign,
    CheckpointLayout,
    CheckpointOtherModel,
    NotFound,
)


@pytest.fixture
def faulty(helpers):
    """Files that fail at the n-th operation of a sync."""

    class Faulty(helpers.FastIo):
        def __init__(self) -> None:
            self.left = -1  # operations until the failure; negative: never
            self.error = errno.ENOSPC
            self.failed = ""

        def tick(self, what: str) -> None:
            if self.left == 0:
                self.failed = what
                raise OSError(self.error, os.strerror(self.error), what)
            self.left -= 1

        def wrap(self, handle: Handle) -> Handle:
            outer = self

            class FaultyHandle(helpers.FastHandle):
                def pwrite(self, data, offset):
                    outer.tick(f"write {self.path.name}")
                    super().pwrite(data, offset)

                def stream(self, data, offset):
                    self.pwrite(data, offset)

                def fsync(self):
                    outer.tick(f"fsync {self.path.name}")

            return FaultyHandle(handle.path, handle.fd)

        def create(self, path, mode=0o644):
            self.tick(f"create {path.name}")
            return self.wrap(super().create(path, mode))

        def open(self, path, *, write=False):
            return self.wrap(super().open(path, write=write))

        def link(self, source, target):
            self.tick(f"link {target.name}")
            super().link(source, target)

        def rename(self, source, target):
            self.tick(f"rename {target.name}")
            super().rename(source, target)

        def unlink(self, path):
            self.tick(f"unlink {path.name}")
            super().unlink(path)

        def fsync_dir(self, path):
            self.tick("fsync of a directory")

        def copy_range(self, source, target, offset, length):
            self.tick("copy")
            super().copy_range(source, target, offset, length)

    return Faulty()


def change(views, amount):
    views["embed.weight"][3] += amount
    views["head.weight"] += amount


@pytest.mark.parametrize(("error", "stride"), [(errno.ENOSPC, 1), (errno.EIO, 5)])
def test_any_operation_fails_and_the_next_sync_works(model, tmp_path, faulty, helpers, error, stride):
    faulty.error = error
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=faulty) as store:
        change(model.views, 1)
        store.sync(model.views, weight_version=1)
        failures = []
        for count in range(0, 200, stride):
            change(model.views, 1)
            before = helpers.weights_on_disk(store.directory)
            head = store.head.generation
            faulty.left, faulty.failed = count, ""
            try:
                report = store.sync(model.views, weight_version=2)
                store.compact()
            except CheckpointError as caught:
                assert "failed" in caught.message
                assert ("the disk is full" in caught.message) == (error == errno.ENOSPC)
                committed = (store.directory / f".hogwild/generations/{head + 1:08d}.commit").exists()
                assert (f"still generation {head}, whole;" in caught.message) == (not committed)
                # Then whoever opens the files now finds a whole generation
                faulty.left = -1
                if not committed:
                    helpers.assert_equal(helpers.weights_on_disk(store.directory), before)
                failures.append(faulty.failed)
                # ... and when there is space again, the next sync brings everything to disk
                store.sync(model.views, weight_version=3)
            else:
                assert report.generation == head + 1
            faulty.left = -1
            assert store.verify(model.views).ok
            change(model.views, 1)
            store.sync(model.views, weight_version=4)  # clears away what the failure left
            store.compact()
            names = {path.suffix for path in (store.directory / ".hogwild/generations").iterdir()}
            assert names <= {".commit", ".undo"}
            if not faulty.failed:
                break
        assert len(failures) > 12 // stride
        assert {name.split()[0] for name in failures} >= (
            {"create", "write", "fsync", "link", "rename"} if stride == 1 else set()
        )


def test_every_operation_of_the_first_copy_fails(model, tmp_path, faulty):
    for count in range(200):
        directory = tmp_path / f"c{count}"
        faulty.left, faulty.failed = count, ""
        try:
            store = CheckpointStore.open(directory, source=model.directory, io=faulty)
        except CheckpointError:
            faulty.left = -1
            store = CheckpointStore.open(directory, source=model.directory, io=faulty)
        with store:
            assert store.verify(model.views).ok
        if not faulty.failed:
            break
    assert count > 20


def test_disk_full_by_the_kernel(model, tmp_path, helpers):
    """A real refusal to write more: a limit on the size of files."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory) as store:
        change(model.views, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(CheckpointError, match=r"the disk is full \(\d+ MiB free\).*still generation 0, whole"):
                store.sync(model.views, weight_version=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        helpers.assert_equal(helpers.weights_on_disk(store.directory), helpers.weights_on_disk(model.directory))
        assert store.sync(model.views, weight_version=1).generation == 1
        assert store.verify(model.views).ok


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_full_on_a_real_small_disk(model, tmp_path, helpers):
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(mount)], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with CheckpointStore.open(mount / "c", source=model.directory) as store:
            change(model.views, 1)
            (mount / "filler").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 8192))
            with pytest.raises(CheckpointError, match="the disk is full"):
                store.sync(model.views, weight_version=1)
            assert store.verify().ok
            (mount / "filler").unlink()
            store.sync(model.views, weight_version=1)
            assert store.verify(model.views).ok
        with pytest.raises(CheckpointError, match="no room for a copy of the model"):
            CheckpointStore.open(mount / "second", source=model.directory)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_on_a_full_disk_fewer_generations_make_room(model, tmp_path, faulty):
    """Given a disk without room for another byte, and a worker that is started again to keep less."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=faulty) as store:
        for version in range(1, 7):
            change(model.views, 1)
            store.sync(model.views, weight_version=version)
            store.compact()
        change(model.views, 1)
        faulty.left = 0
        with pytest.raises(CheckpointError, match="lower HOGWILD_KEEP_LAST"):
            store.sync(model.views, weight_version=7)
    undo = store.directory / ".hogwild/generations"

    class Full(type(faulty)):
        def tick(self, what):
            if what.split()[0] in ("create", "write"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    with CheckpointStore.open(tmp_path / "c", io=Full(), keep_last=2) as again:
        assert [commit.generation for commit in again.generations()] == [4, 5, 6]
        assert len(list(undo.glob("*.undo"))) == 2


def test_read_only_directory(model, tmp_path, faulty):
    faulty.error = errno.EROFS
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=faulty) as store:
        change(model.views, 1)
        faulty.left = 0
        with pytest.raises(
            CheckpointError, match="can't be written: make it writable for this user, or point HOGWILD_C"
        ):
            store.sync(model.views, weight_version=1)


@pytest.mark.parametrize("amount", ["a block", "a shard"])
def test_files_that_can_not_be_written_are_found_before_there_is_a_generation(store, model, monkeypatch, amount):
    model.views["norm.weight"][3] += 1
    if amount == "a shard":
        model.views["head.weight"] += 1
        monkeypatch.setattr(os, "access", lambda path, mode: path != store.directory)
    else:  # root may write to everything: played
        normal = store._io.open

        def read_only(path, *, write=False):
            if write and path.suffix == ".safetensors":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return normal(path, write=write)

        monkeypatch.setattr(store._io, "open", read_only)
    with pytest.raises(CheckpointError, match=r"can't be written: make it.*still generation 0, whole"):
        store.sync(model.views, weight_version=1)
    monkeypatch.undo()
    assert store.sync(model.views, weight_version=1).generation == 1
    assert store.verify(model.views).ok


def as_another_user(work) -> str:
    """What `work` returns, or the message of the CheckpointError it raises, in a child process of user 65534."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        answer = "ended"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            answer = work()
        except CheckpointError as error:
            answer = error.message
        except BaseException as error:
            answer = repr(error)
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("sticky", [False, True])
def test_a_shard_of_another_user_is_replaced_where_the_directory_lets_one(model, io, helpers, sticky):
    """Linux links no file that is neither one's own nor writable, and in a sticky directory replaces none of others."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # others may enter it, unlike pytest's
    try:
        folder.chmod(0o755)
        directory = folder / "c"
        with CheckpointStore.open(directory, source=model.directory, io=io) as store:
            before = helpers.weights_on_disk(directory)["head.weight"].clone()
            model.views["norm.weight"] += 1
            store.sync(model.views, weight_version=1)  # what this imports, the other user need not be able to read
        for path in [directory / ".hogwild", *(directory / ".hogwild").rglob("*")]:
            os.chown(path, 65534, 65534)
        for path in filter(Path.is_file, directory.iterdir()):
            path.chmod(0o644)
        directory.chmod(0o1777 if sticky else 0o777)
        model.views["head.weight"] += 1

        def work() -> str:
            with CheckpointStore.open(directory, io=io) as mine:
                assert mine.sync(model.views, weight_version=2).applied
                assert mine.head.replaced
                assert not mine.head.deferred
                assert mine.verify(model.views).ok
                mine.rollback(1, model.views)
                return f"rolled back: {torch.equal(helpers.weights_on_disk(directory)['head.weight'], before)}"

        answer = as_another_user(work)
        assert re.search(r"can't be written.*still generation 1, whole" if sticky else "^rolled back: True$", answer)
    finally:
        shutil.rmtree(folder)


def test_generations_on_another_file_system_are_refused_at_once(store, io, tmp_path):
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other file system")
    store.close()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        moved = Path(elsewhere) / "moved"
        shutil.move(store.directory / ".hogwild", moved)
        (store.directory / ".hogwild").symlink_to(moved)
        with pytest.raises(CheckpointError, match="is on another file system than"):
            CheckpointStore.open(store.directory, io=io)


def test_a_shard_that_is_replaced_keeps_its_mode_and_owner(store, model):
    path = store.directory / "model-00002-of-00002.safetensors"
    path.chmod(0o664)
    owner = (1234, 2345) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    before = os.umask(0o077)
    try:
        model.views["head.weight"] += 1
        store.sync(model.views, weight_version=1)
    finally:
        os.umask(before)
    assert store.head.replaced
    assert path.stat().st_mode & 0o777 == 0o664
    assert (path.stat().st_uid, path.stat().st_gid) == owner


def test_files_changed_by_somebody_else_are_refused_and_can_be_adopted(store, model, io, helpers):
    change(model.views, 1)
    store.sync(model.views, weight_version=1)
    # Given a foreign edit inside a block that training has changed too
    path = store.directory / "model-00001-of-00002.safetensors"
    spec = store.layout.by_name["embed.weight"]
    data = bytearray(path.read_bytes())
    data[spec.offset + 700] ^= 0xFF
    path.write_bytes(data)
    change(model.views, 1)
    # When, then
    with pytest.raises(CheckpointForeign, match=r"embed\.weight differs.*`hogwild checkpoint adopt`"):
        store.sync(model.views, weight_version=2)
    assert path.read_bytes() == bytes(data)
    assert store.verify().disk == {"embed.weight": 1}
    with pytest.raises(CheckpointForeign, match="can't be brought back"):
        store.rollback(0)
    with pytest.raises(CheckpointForeign, match="was not loaded"):
        store.restore(model.views)
    # When the files are adopted
    commit = store.adopt()
    assert (commit.kind, commit.generation, commit.weight_version) == ("adopt", 2, 2)  # other weights than version 1
    assert [entry.generation for entry in store.generations()] == [2]
    assert store.verify().ok
    store.sync(model.views, weight_version=2)
    assert store.verify(model.views).ok
    assert store.adopt().generation == 3  # nothing differs: nothing done


def test_a_foreign_edit_outside_the_changed_blocks_is_found_by_verify(store, model):
    path = store.directory / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    report = store.verify()
    assert not report.ok
    with pytest.raises(CheckpointCorrupt, match="1 blocks on disk differ from generation 0"):
        report.raise_for_mismatch()


def test_replaced_by_another_model_while_closed(store, model, tmp_path, io, helpers):
    store.close()
    from safetensors.torch import save_file

    weights = helpers.weights_on_disk(store.directory)
    shard = {name: weights[name] for name in ("embed.weight", "layer.q.weight", "layer.down.weight")}
    shard["norm.weight"] = torch.zeros(3)
    save_file(shard, store.directory / "model-00001-of-00002.safetensors")
    with CheckpointStore.open(store.directory, io=io) as again:
        with pytest.raises(CheckpointForeign, match="adopt"):
            again.begin_sync({}, weight_version=1)
        again.adopt()
        assert again.verify().ok
        assert again.layout.id == Layout.read(again.directory).id


@pytest.mark.parametrize("change", ["weights", "config", "header"])
def test_another_model_of_the_same_name_is_refused(store, model, tmp_path, io, helpers, change):
    store.close()
    other = tmp_path / "other" / model.directory.name
    shutil.copytree(model.directory, other)
    shard = other / "model-00001-of-00002.safetensors"
    if change == "weights":
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
    elif change == "config":
        (other / "config.json").write_text('{"model_type": "tiny", "rope_scaling": null}')
    else:
        rewrite(shard, added={"__metadata__": {"format": "np"}})
    before = helpers.weights_on_disk(store.directory)
    with pytest.raises(CheckpointOtherModel, match=f"cloned from {model.directory}.*HOGWILD_CHECKPOINT_DIR"):
        CheckpointStore.open(store.directory, source=other, io=io)
    shutil.rmtree(model.directory)
    other.rename(model.directory)  # the same, where the first one was
    with pytest.raises(CheckpointOtherModel):
        CheckpointStore.open(store.directory, source=model.directory, io=io)
    helpers.assert_equal(helpers.weights_on_disk(store.directory), before)
    for source in (None, store.directory):
        CheckpointStore.open(store.directory, source=source, io=io).close()
    CheckpointStore.open(store.directory, source=model.directory, same_source=False, io=io).close()


def test_the_model_may_move_be_copied_or_go(store, model, tmp_path, io, monkeypatch):
    change(model.views, 1)
    store.sync(model.views, weight_version=1)
    store.export(tmp_path / "export")
    store.close()
    copy, moved = tmp_path / "copy", tmp_path / "moved"
    shutil.copytree(model.directory, copy)
    model.directory.rename(moved)
    for source in (model.directory, copy, moved, tmp_path / "export"):
        CheckpointStore.open(store.directory, source=source, io=io).close()
    monkeypatch.setattr(source_module, "file_table", None)  # it lies where it was: nothing is read
    CheckpointStore.open(store.directory, source=moved, io=io).close()


@pytest.mark.parametrize("record", [None, b"", b"[1]", b'{"version": 2}'])
def test_a_checkpoint_without_a_record_of_its_model_takes_any_and_records_the_right_one(
    store, model, tmp_path, io, record
):
    store.close()
    path = store.directory / ".hogwild" / "source.json"
    written = path.read_bytes()
    path.unlink() if record is None else path.write_bytes(record)
    other = tmp_path / "other"
    shutil.copytree(model.directory, other)
    with (other / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    CheckpointStore.open(store.directory, source=other, io=io).close()
    assert record is None or path.read_bytes() == record
    CheckpointStore.open(store.directory, source=model.directory, io=io).close()
    assert path.read_bytes() == written
    with pytest.raises(CheckpointOtherModel):
        CheckpointStore.open(store.directory, source=other, io=io)


def rewrite(path: Path, **changes) -> None:
    """Another header over the same data: names, types, places or metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for old, new in changes.pop("renamed", {}).items():
        header[new] = header.pop(old)
    header |= changes.pop("added", {})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("opened", ["before", "afterwards", "to read"])
@pytest.mark.parametrize(
    "changes",
    [
        {"renamed": {"norm.weight": "other.weight"}},
        {"added": {"__metadata__": {"format": "np"}}},
        {"added": {"more.weight": {"dtype": "F32", "shape": [0, 9], "data_offsets": [0, 0]}}},
    ],
    ids=["renamed", "metadata", "one more"],
)
def test_another_header_over_the_same_data_is_foreign(store, model, io, tmp_path, changes, opened):
    name = "model-00001-of-00002.safetensors"
    if opened != "before":
        store.close()
    rewrite(store.directory / name, **changes)
    index = store.directory / "model.safetensors.index.json"
    if "renamed" in changes:
        index.write_text(index.read_text().replace("norm.weight", "other.weight"))
    if opened != "before":
        store = CheckpointStore.open(store.directory, io=io, read_only=opened == "to read")
    report = store.verify()
    assert not report.ok and report.headers == (name,)
    with pytest.raises(CheckpointCorrupt, match=f"metadata in {name} are not those of generation 0"):
        report.raise_for_mismatch()
    attempts = [lambda: store.export(tmp_path / "e"), lambda: store.live_digest(model.views)]
    if opened != "to read":
        attempts += [lambda: store.restore(model.views), lambda: store.rollback(0, model.views)]
    for attempt in attempts:
        with pytest.raises(CheckpointForeign, match="hogwild checkpoint adopt"):
            attempt()
    if opened != "to read":
        assert store.adopt().generation == 1
        assert store.verify().ok
    store.close()


def test_replaced_while_open(store, model):
    path = store.directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    change(model.views, 1)
    with pytest.raises(CheckpointForeign, match="was replaced by another file"):
        store.sync(model.views, weight_version=1)


def test_second_writer_is_refused(store, io):
    with pytest.raises(CheckpointError, match=rf"kept by another process \(pid {os.getpid()}\)"):
        CheckpointStore.open(store.directory, io=io)
    store.close()
    CheckpointStore.open(store.directory, io=io).close()


def test_a_failed_open_leaves_no_lock(store, io, monkeypatch):
    store.close()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "note", full)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            CheckpointStore.open(store.directory, io=io)
    CheckpointStore.open(store.directory, io=io).close()
    assert caught.value.message


def test_a_failed_probe_leaves_nothing_behind(store, model, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    change(model.views, 1)
    with monkeypatch.context() as patched:
        patched.setattr(store._io, "reflink", broken)
        with pytest.raises(CheckpointError, match="Input/output error"):
            store.sync(model.views, weight_version=1)
    assert not list((store.directory / ".hogwild").glob("*.tmp"))


def test_a_killed_writer_leaves_no_lock(model, tmp_path):
    code = (
        "import sys, os, signal; from hogwild.checkpoint.store import CheckpointStore\n"
        "CheckpointStore.open(sys.argv[1], source=sys.argv[2]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c"), str(model.directory)], check=False)
    assert done.returncode == -9
    with CheckpointStore.open(tmp_path / "c") as store:
        assert store.verify(model.views).ok


def test_closed_store_refuses_to_sync(store, model):
    store.close()
    with pytest.raises(CheckpointError, match="was closed"):
        store.sync(model.views, weight_version=1)


def test_directory_with_other_files_is_not_taken(model, tmp_path, io):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="holds files already"):
        CheckpointStore.open(tmp_path / "c", source=model.directory, io=io)


def test_a_wrong_path_leaves_nothing_behind(tmp_path, io):
    (tmp_path / "empty").mkdir()
    for source in (None, tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(CheckpointLayout):
            CheckpointStore.open(tmp_path / "empty", source=source, io=io)
        with pytest.raises(CheckpointLayout):
            CheckpointStore.open(tmp_path / "new", source=source, io=io)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_an_unfinished_copy_wants_its_model(model, tmp_path, faulty):
    faulty.left = 12
    with pytest.raises(CheckpointError, match="the disk is full"):
        CheckpointStore.open(tmp_path / "c", source=model.directory, io=faulty)
    faulty.left = -1
    with pytest.raises(CheckpointError, match="an unfinished copy of a model"):
        CheckpointStore.open(tmp_path / "c", io=faulty)
    CheckpointStore.open(tmp_path / "c", source=model.directory, io=faulty).close()


def test_links_are_not_written_through(model, tmp_path, io, helpers):
    (tmp_path / "snapshot").mkdir()
    for path in model.directory.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    with pytest.raises(CheckpointLayout, match="is a link"):
        CheckpointStore.open(tmp_path / "snapshot", io=io)
    # ... but a clone of such a directory is a directory of its own
    with CheckpointStore.open(tmp_path / "c", source=tmp_path / "snapshot", io=io) as store:
        model.views["norm.weight"].zero_()
        store.sync(model.views, weight_version=1)
        assert store.verify(model.views).ok
    assert helpers.weights_on_disk(model.directory)["norm.weight"].any()


def linked_copy(directory, target):
    """What `cp -al` makes."""
    shutil.copytree(directory, target, copy_function=os.link)


def files_of(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_backup_by_hard_links_keeps_what_it_has(model, tmp_path, io, helpers):
    """Given hard links to all files, made beside the open checkpoint."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        linked_copy(store.directory, tmp_path / "backup")
        before = files_of(tmp_path / "backup")
        # When a sync changes one block, of one file
        model.views["norm.weight"][0] = 1
        report = store.sync(model.views, weight_version=1)
        assert report.blocks_changed == 1
        # Then the backup is what it was, and a checkpoint of its own when no lock is shared any more
        assert files_of(tmp_path / "backup") == before
        assert store.verify(model.views).ok
        # ... and of what was written anew, the next sync writes a block again
        model.views["norm.weight"][0] = 2
        assert store.sync(model.views, weight_version=2).bytes_written < 30_000
        store.rollback(0)
    # ... and the file that still has two names is no reason not to open either
    for directory, generation in ((store.directory, 3), (tmp_path / "backup", 0)):
        with CheckpointStore.open(directory, io=io) as again:
            assert again.head.generation == generation
            assert again.verify().ok
    assert helpers.weights_on_disk(tmp_path / "backup")["norm.weight"][0] not in (1, 2)


def test_a_backup_by_hard_links_of_an_unfinished_sync_keeps_what_it_has(model, tmp_path, io, helpers):
    """Given a generation that a reader kept out of the files, and links to those files made then."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, reader_patience=0) as store:
        lock = FileLock(store.directory / ".hogwild/readers.lock")
        assert lock.acquire(shared=True)
        model.views["norm.weight"][0] = 1
        assert not store.sync(model.views, weight_version=1).applied
        lock.release()
    (tmp_path / "backup").mkdir()
    for path in store.directory.glob("*.safetensors"):
        os.link(path, tmp_path / "backup" / path.name)
    before = files_of(tmp_path / "backup")
    with CheckpointStore.open(store.directory, io=io) as again:
        assert again.verify(model.views).ok
        assert files_of(tmp_path / "backup") == before
        assert not list((store.directory / ".hogwild/generations").glob("*.tmp"))


def test_source_on_a_file_system_without_reflink_or_copy_file_range(model, tmp_path, helpers, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=helpers.FastIo()) as store:
        change(model.views, 1)
        store.sync(model.views, weight_version=1)
        assert store.verify(model.views).ok


def test_damaged_commit_record(store, model, io):
    change(model.views, 1)
    store.sync(model.views, weight_version=1)
    store.close()
    path = store.directory / ".hogwild/generations/00000001.commit"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    for read_only in (False, True):
        with pytest.raises(CheckpointCorrupt, match=r"does not match its checksum.*`hogwild checkpoint adopt`"):
            CheckpointStore.open(store.directory, read_only=read_only, io=io)


@pytest.mark.parametrize("damaged", [0, 3, 4], ids=["the full table", "a record between", "the head"])
def test_adopt_goes_on_with_whole_files_when_records_are_damaged(model, tmp_path, io, helpers, damaged):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        for version in range(1, 5):
            model.views["norm.weight"][0] = version
            store.sync(model.views, weight_version=10 * version)
        base = store.head.base_model
    generations = store.directory / ".hogwild/generations"
    path = generations / f"{damaged:08d}.commit"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    before = helpers.weights_on_disk(store.directory)
    with CheckpointStore.open(store.directory, io=io, start_anew=True) as again:
        # Then the files are a generation that needs no record before it, and what was lost is said
        assert again.lost == (0, 1, 2, 3, 4)
        head = again.head
        assert (head.generation, head.kind, head.base_model) == (5, "adopt", base)
        assert head.weight_version == (31 if damaged == 4 else 41)
        helpers.assert_equal(helpers.weights_on_disk(store.directory), before)
        assert again.verify(model.views).ok
        assert [path.name for path in generations.glob("*")] == ["00000005.commit"]
        model.views["norm.weight"][0] = 6
        again.sync(model.views, weight_version=60)
        again.rollback(5, model.views)
        assert model.views["norm.weight"][0] == 4
    with CheckpointStore.open(store.directory, io=io, start_anew=True) as whole:
        assert not whole.lost
        assert whole.head.generation == 7


@pytest.mark.parametrize("dense", [False, True])
def test_a_generation_whose_record_is_damaged_is_first_put_into_the_files(model, tmp_path, io, helpers, dense):
    """Given a reader that kept the last generation out of the files, and damage in its record."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, reader_patience=0) as store:
        lock = FileLock(store.directory / ".hogwild/readers.lock")
        assert lock.acquire(shared=True)
        for view in model.views.values() if dense else [model.views["norm.weight"]]:
            view.add_(1)
        assert not store.sync(model.views, weight_version=1).applied
        lock.release()
    path = store.directory / ".hogwild/generations/00000001.commit"
    path.write_bytes(path.read_bytes()[:-1])
    with CheckpointStore.open(store.directory, io=io, start_anew=True) as again:
        assert again.head.generation == 2
        assert again.verify(model.views).ok


def test_a_redo_file_that_is_damaged_too_is_said_and_left_out(model, tmp_path, io, helpers, caplog):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, reader_patience=0) as store:
        before = helpers.weights_on_disk(store.directory)
        lock = FileLock(store.directory / ".hogwild/readers.lock")
        assert lock.acquire(shared=True)
        change(model.views, 1)
        assert not store.sync(model.views, weight_version=1).applied
        lock.release()
    path = store.directory / ".hogwild/generations/00000001.redo"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt, match="`hogwild checkpoint adopt`"):
        CheckpointStore.open(store.directory, io=io)
    with CheckpointStore.open(store.directory, io=io, start_anew=True) as again:
        assert "they may hold blocks of two generations" in caplog.text
        assert again.verify().ok
    helpers.assert_equal(helpers.weights_on_disk(store.directory), before)


def test_a_damaged_record_that_the_newer_ones_do_not_need_ends_the_history(model, tmp_path, io, helpers, caplog):
    """Given records of which the third has a full table, and damage in the one before."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        for version in range(1, 5):
            if version == 2:
                for view in model.views.values():
                    view.add_(1)
            model.views["norm.weight"][0] = version
            store.sync(model.views, weight_version=version)
            store.compact()
    generations = store.directory / ".hogwild/generations"
    damaged = generations / "00000001.commit"
    data = bytearray(damaged.read_bytes())
    data[60] ^= 1
    damaged.write_bytes(data)
    with CheckpointStore.open(store.directory, read_only=True, io=io) as reader:
        assert [commit.generation for commit in reader.generations()] == [2, 3, 4]
        assert reader.verify().ok
        reader.export(tmp_path / "e", 2)
    with CheckpointStore.open(store.directory, io=io) as again:
        assert "older generations can't be rolled back to any more: " in caplog.text
        again.rollback(2, model.views)
        assert model.views["norm.weight"][0] == 2
        assert again.verify(model.views).ok
    assert sorted(path.name[7:] for path in generations.glob("*.commit")) == [f"{n}.commit" for n in (2, 3, 4, 5)]
    # ... while one that they do need is refused
    damaged = generations / "00000002.commit"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt, match=r"00000002\.commit does not match its checksum"):
        CheckpointStore.open(store.directory, io=io)


def test_a_damaged_record_that_undo_data_was_still_to_be_made_with_ends_the_history(
    model, tmp_path, io, helpers, caplog
):
    """Given a sync that replaced everything, a worker that stopped before its undo data was made, and damage before."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        model.views["norm.weight"][0] = 1
        store.sync(model.views, weight_version=1)
        for view in model.views.values():
            view.add_(1)
        store.sync(model.views, weight_version=2)
        assert store.head.deferred
    damaged = store.directory / ".hogwild/generations/00000001.commit"
    data = bytearray(damaged.read_bytes())
    data[60] ^= 1
    damaged.write_bytes(data)
    with CheckpointStore.open(store.directory, io=io) as again:
        assert [commit.generation for commit in again.generations()] == [2]
        assert again.verify(model.views).ok
        model.views["norm.weight"][0] = 3
        again.sync(model.views, weight_version=3)
        again.rollback(2, model.views)
        assert again.verify(model.views).ok


def test_a_reader_opens_while_old_generations_are_forgotten(store, model, io, monkeypatch):
    for version in range(1, 7):
        change(model.views, 1)
        store.sync(model.views, weight_version=version)
    read, forgotten = records.read_record, []

    def slow(path):
        if not forgotten:
            forgotten.extend(["by now"])
            store._history.prune(1)
        return read(path)

    before = set(store._generations.glob("*.commit"))
    monkeypatch.setattr(history, "read_record", slow)
    reader = CheckpointStore.open(store.directory, read_only=True, io=io)
    assert set(store._generations.glob("*.commit")) < before
    assert reader.head.generation == 6


def test_a_reader_is_told_what_can_not_be_read(store, io, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(history, "read_record", broken)
    with pytest.raises(CheckpointError, match=r"reading the checkpoint .* failed: Input/output error"):
        CheckpointStore.open(store.directory, read_only=True, io=io)


@pytest.mark.parametrize("place", [10, 70, 200, -20])
def test_damaged_undo_file_refuses_the_rollback_and_changes_nothing(store, model, helpers, place):
    change(model.views, 1)
    store.sync(model.views, weight_version=1)
    store.compact()
    path = store.directory / ".hogwild/generations/00000001.undo"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    live = model.copy()
    with pytest.raises(CheckpointCorrupt):
        store.rollback(0, model.views)
    helpers.assert_equal(model.views, live)
    assert store.verify(model.views).ok
    change(model.views, 1)
    assert store.sync(model.views, weight_version=2).generation == 2


def test_undo_file_of_a_later_format_is_refused(store, model):
    """Given a valid frame in an encoding of the future, and a file of a later version."""
    import xxhash

    change(model.views, 1)
    store.sync(model.views, weight_version=1)
    store.compact()
    path = store.directory / ".hogwild/generations/00000001.undo"
    data = bytearray(path.read_bytes())
    blocks = struct.unpack_from("<I", data, 64 + 8)[0]
    data[64 + 12] = 7
    head = bytes(data[64 : 64 + 32]) + bytes(data[64 + 48 : 64 + 48 + 4 * blocks])
    struct.pack_into("<Q", data, 64 + 32, xxhash.xxh3_64_intdigest(head))
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="the encoding 7 is not known"):
        store.rollback(0)
    struct.pack_into("<I", data, 8, 2)
    struct.pack_into("<Q", data, 56, xxhash.xxh3_64_intdigest(bytes(data[:56])))
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="has format version 2"):
        store.rollback(0)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_reader_beside_a_writer_sees_one_generation(store, model, io, tmp_path, helpers):
    """Loads of a second process through the readers' lock, while syncs go on: never a mixture."""
    states = {0: model.copy()}
    seen, wrong, stop = set(), [], threading.Event()

    def read() -> None:
        reader = CheckpointStore.open(store.directory, read_only=True, io=io)
        while not stop.is_set():
            with reader.reading() as commit:
                found = helpers.weights_on_disk(store.directory)  # mapped: to be compared while the lock is held
                state = states[commit.generation]
                seen.add(commit.generation)
                if any(not torch.equal(found[name], state[name]) for name in state):
                    wrong.append(commit.generation)

    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + 60
    for version in itertools.count(1):
        change(model.views, 1)
        states[version] = model.copy()
        store.sync(model.views, weight_version=version)
        time.sleep(0.02)
        if (version >= 14 and len(seen) > 3) or time.monotonic() > deadline:
            break
    stop.set()
    thread.join()
    assert not wrong
    assert len(seen) > 3


def test_generation_that_is_being_exported_is_not_pruned(model, tmp_path, io, helpers, monkeypatch):
    """Given an export of the oldest generation, which the next sync would prune, held up half-way."""
    options = {"keep_last": 1, "io": io, "reader_patience": 0.1}
    with CheckpointStore.open(tmp_path / "c", source=model.directory, **options) as store:
        change(model.views, 1)
        store.sync(model.views, weight_version=1)
        reader = CheckpointStore.open(store.directory, read_only=True, **options)
        snapshot = reader._snapshot

        def slow(generation):
            # When two syncs come in between
            for version in (2, 3):
                change(model.views, 1)
                if version == 2:
                    assert not store.sync(model.views, weight_version=version).applied
                else:
                    with pytest.raises(CheckpointError, match="is being read"):
                        store.sync(model.views, weight_version=version)
            return snapshot(generation)

        monkeypatch.setattr(reader, "_snapshot", slow)
        reader.export(tmp_path / "e", 0)
        # Then the export is generation 0 all the same
        helpers.assert_equal(helpers.weights_on_disk(tmp_path / "e"), helpers.weights_on_disk(model.directory))
        store.sync(model.views, weight_version=4)
        assert store.verify(model.views).ok
        assert len(store.generations()) == 2


def test_reader_in_the_way_does_not_lose_the_generation(model, tmp_path, io, helpers):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, reader_patience=0.1) as store:
        before = helpers.weights_on_disk(store.directory)
        reader = CheckpointStore.open(store.directory, read_only=True, io=io, reader_patience=0.1)
        with reader.reading():
            # When a sync comes while somebody reads
            change(model.views, 1)
            report = store.sync(model.views, weight_version=1)
            # Then it is durable, and the reader goes on seeing what it saw
            assert (report.generation, report.applied) == (1, False)
            helpers.assert_equal(helpers.weights_on_disk(store.directory), before)
            change(model.views, 1)
            with pytest.raises(CheckpointError, match="is being read"):
                store.sync(model.views, weight_version=2)
        with pytest.raises(CheckpointError, match="not completely in its files"), reader.reading():
            pass
        # ... and the next sync brings both into the files
        assert store.sync(model.views, weight_version=2).applied
        assert store.verify(model.views).ok
        assert reader.verify().ok
        assert reader.head.generation == 2


def test_a_reader_that_fails_leaves_no_lock(store, model, io):
    reader = CheckpointStore.open(store.directory, read_only=True, io=io)
    record = store.directory / ".hogwild/generations/00000000.commit"
    good = record.read_bytes()
    record.write_bytes(good[:-1])
    with pytest.raises(CheckpointCorrupt) as caught, reader.reading():
        pass
    record.write_bytes(good)
    # While the error, and with it every frame that raised it, is still in somebody's hands
    change(model.views, 1)
    assert store.sync(model.views, weight_version=1).applied
    assert caught.value.message


def test_a_forked_child_does_not_keep_a_lock_that_was_given_back(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock._fd]) as child:
        lock.release()
        again = FileLock(tmp_path / "lock")
        assert again.acquire()
        again.release()
        child.kill()


def test_old_files_that_go_while_they_are_opened_leave_none_of_them_open(store, model, io):
    """Given two old files, of which compaction removes one after a reader opened the other."""
    before = model.views["norm.weight"].clone()
    for view in model.views.values():
        view.add_(1)
    store.sync(model.views, weight_version=1)
    olds = sorted(store.head.deferred.values())
    assert len(olds) == 2
    opened = []

    class Io(type(io)):
        def open(self, path, *, write=False):
            if path.name == olds[1]:
                store.compact()
            opened.append(super().open(path, write=write))
            return opened[-1]

    reader = CheckpointStore.open(store.directory, read_only=True, io=Io())
    with reader._snapshot(0) as snapshot:
        assert [handle.path.name for handle in opened if handle.fd >= 0] == ["00000001.undo"]
        spec = store.layout.by_name["norm.weight"]
        norm = snapshot.read(spec, np.arange(1))
    assert bytes(norm) == bytes(before.numpy().data)


def test_unapplied_generation_is_applied_by_the_next_open(model, tmp_path, io):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, reader_patience=0) as store:
        lock = FileLock(store.directory / ".hogwild/readers.lock")
        assert lock.acquire(shared=True)
        change(model.views, 1)
        assert not store.sync(model.views, weight_version=1).applied
        lock.release()
    with CheckpointStore.open(tmp_path / "c", io=io) as again:
        assert again.verify(model.views).ok


def test_read_only_store_writes_nothing(store, model, io, tmp_path):
    reader = CheckpointStore.open(store.directory, read_only=True, io=io)
    assert [commit.generation for commit in reader.generations()] == [0]
    for attempt in (lambda: reader.sync(model.views, weight_version=1), lambda: reader.rollback(0), reader.adopt):
        with pytest.raises(CheckpointError, match="opened for reading only"):
            attempt()
    with pytest.raises(NotFound, match="no checkpoint of Hogwild's"):
        CheckpointStore.open(tmp_path, read_only=True, io=io)


def test_real_files_are_synced(tmp_path):
    """The real helper does call fsync: a spy on the system call sees file and directory."""
    synced = []
    real = os.fsync

    def spy(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    os.fsync = spy
    try:
        FileIo().write_atomic(tmp_path / "file", [b"abc", b"def"])
    finally:
        os.fsync = real
    assert synced == ["file.tmp", tmp_path.name]
    assert (tmp_path / "file").read_bytes() == b"abcdef"
