"""Syncs that replace whole files: what is read, what is kept of the old ones, and how undo data is made of it."""

import errno
import json
import logging
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash

from hogwild.checkpoint import compact as compacting
from hogwild.checkpoint import durable
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.known import KnownFiles
from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import CheckpointCorrupt, CheckpointError, CheckpointForeign

SHARD = "model-00002-of-00002.safetensors"


def replace_shard(views, amount: float = 1.0) -> None:
    """Nearly all of the second shard changes, one row in the first."""
    views["head.weight"] += amount
    views["half.weight"].neg_()
    views["embed.weight"][3] += amount


@pytest.fixture
def generations(store):
    return store.directory / ".hogwild/generations"


@pytest.fixture
def contents(store, model, helpers):
    """Generations 0 and 1; 1 replaced a file and has no undo data yet."""
    found = {0: on_disk(store, helpers)}
    replace_shard(model.views)
    assert store.sync(model.views, weight_version=1).applied
    found[1] = on_disk(store, helpers)
    return found


def on_disk(store, helpers):
    """Copies: what safetensors loads is mapped, and follows blocks that are put in place."""
    return {name: tensor.clone() for name, tensor in helpers.weights_on_disk(store.directory).items()}


def exported(store, generation, tmp_path, helpers):
    target = tmp_path / f"export{generation}-{threading.get_ident()}-{os.urandom(4).hex()}"
    store.export(target, generation)
    return helpers.weights_on_disk(target)


def test_the_old_file_is_the_history_until_undo_data_is_made(store, contents, generations, tmp_path, helpers):
    assert {path.name for path in generations.iterdir()} == {
        "00000000.commit", "00000001.commit", "00000001.part", "00000001.1.old"
    }  # fmt: skip
    helpers.assert_equal(exported(store, 0, tmp_path, helpers), contents[0])
    assert store.compact() > 0
    assert {path.name for path in generations.iterdir()} == {"00000000.commit", "00000001.commit", "00000001.undo"}
    helpers.assert_equal(exported(store, 0, tmp_path, helpers), contents[0])


@pytest.mark.parametrize("compacted", [False, True])
def test_a_rollback_does_not_need_undo_data_first(store, model, contents, helpers, compacted):
    if compacted:
        store.compact()
    store.rollback(0, model.views)
    helpers.assert_equal(helpers.weights_on_disk(store.directory), contents[0])
    store.rollback(1, model.views)
    helpers.assert_equal(helpers.weights_on_disk(store.directory), contents[1])
    assert store.verify(model.views).ok


def test_the_next_sync_makes_the_undo_data_that_nobody_made(store, model, contents, generations, tmp_path, helpers):
    replace_shard(model.views)
    store.sync(model.views, weight_version=2)
    assert (generations / "00000001.undo").exists() and not (generations / "00000001.1.old").exists()
    for generation, expected in contents.items():
        helpers.assert_equal(exported(store, generation, tmp_path, helpers), expected)


def test_a_sync_begins_while_undo_data_is_made_and_its_commit_waits(
    store, model, contents, monkeypatch, tmp_path, helpers
):
    begun, go_on = threading.Event(), threading.Event()
    original = compacting.changed_frames

    def slow(*args):
        begun.set()
        assert go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(compacting, "changed_frames", slow)
    compaction = threading.Thread(target=store.compact)
    compaction.start()
    assert begun.wait(60)
    replace_shard(model.views)
    pending = store.begin_sync(model.views, weight_version=2)  # does not wait: training is paused
    commit = threading.Thread(target=pending.commit)
    commit.start()
    commit.join(0.1)
    assert commit.is_alive() and store.head.generation == 1
    go_on.set()
    compaction.join()
    commit.join()
    assert store.head.generation == 2
    for generation, expected in contents.items():
        helpers.assert_equal(exported(store, generation, tmp_path, helpers), expected)


def test_closing_gives_up_what_is_half_made_and_the_next_open_makes_it(
    store, model, contents, monkeypatch, io, tmp_path, helpers
):
    begun = threading.Event()
    original = compacting.changed_frames

    def slow(*args):
        begun.set()
        while not store._closing:
            pass
        return original(*args)

    made = []
    monkeypatch.setattr(compacting, "changed_frames", slow)
    thread = threading.Thread(target=lambda: made.append(store.compact()))
    thread.start()
    assert begun.wait(60)
    store.close()
    thread.join()
    assert made == [0] and store.compact() == 0
    assert not (store.directory / ".hogwild/generations/00000001.undo").exists()
    with CheckpointStore.open(store.directory, io=io) as again:
        assert (store.directory / ".hogwild/generations/00000001.undo").exists()
        helpers.assert_equal(exported(again, 0, tmp_path, helpers), contents[0])


def test_no_room_for_undo_data_at_the_start_is_no_reason_not_to_start(
    store, contents, helpers, tmp_path, caplog, model
):
    class Full(helpers.FastIo):
        full = True

        def create(self, path, mode=0o644):
            if self.full and path.name.endswith(".undo.tmp"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(path, mode)

    store.close()
    full = Full()
    with CheckpointStore.open(store.directory, io=full) as again:
        assert "undo data of generation 1 is not made yet" in caplog.text
        helpers.assert_equal(exported(again, 0, tmp_path, helpers), contents[0])
        replace_shard(model.views)
        with pytest.raises(CheckpointError, match=r"disk is full.*still generation 1, whole"):
            again.sync(model.views, weight_version=2)
        full.full = False
        assert again.sync(model.views, weight_version=2).generation == 2
        helpers.assert_equal(exported(again, 0, tmp_path, helpers), contents[0])


def test_damaged_old_contents_cost_the_history_before_and_nothing_else(store, model, contents, generations, caplog):
    old = generations / "00000001.1.old"
    data = bytearray(old.read_bytes())
    data[-100] ^= 1
    old.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert store.compact() == 0
    assert "generations before 1 can't be rolled back to any more" in caplog.text
    assert [commit.generation for commit in store.generations()] == [1]
    assert not old.exists()
    replace_shard(model.views)
    store.sync(model.views, weight_version=2)
    assert store.verify(model.views).ok
    assert [commit.generation for commit in store.generations()] == [1, 2]


def test_a_foreign_edit_after_a_sync_does_not_become_history(store, model, contents, helpers):
    path = store.directory / SHARD
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # in half.weight
    path.write_bytes(data)
    with pytest.raises(CheckpointForeign, match="differs from the last generation"):
        store.compact()
    replace_shard(model.views)
    with pytest.raises(CheckpointForeign, match="differs from the last generation"):
        store.sync(model.views, weight_version=2)
    assert [commit.generation for commit in store.generations()] == [0, 1]
    path.write_bytes(bytes(data[:-100]) + bytes([data[-100] ^ 1]) + bytes(data[-99:]))  # put right again
    store.sync(model.views, weight_version=2)
    assert [commit.generation for commit in store.generations()] == [0, 1, 2]


def test_files_without_hard_links_get_their_undo_data_within_the_sync(model, tmp_path, helpers):
    class NoLinks(helpers.FastIo):
        def link(self, source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=NoLinks()) as store:
        before = on_disk(store, helpers)
        replace_shard(model.views)
        report = store.sync(model.views, weight_version=1)
        assert report.undo_bytes == (store.directory / ".hogwild/generations/00000001.undo").stat().st_size
        assert store.compact() == 0
        assert {path.name for path in (store.directory / ".hogwild").iterdir()} == {
            "lock", "readers.lock", "source.json", "generations"
        }  # fmt: skip
        helpers.assert_equal(exported(store, 0, tmp_path, helpers), before)


class Counting(FileIo):
    """Counts bytes that are read from weight files."""

    def __init__(self) -> None:
        self.read = 0

    def open(self, path, *, write=False):
        outer = self

        class CountingHandle(Handle):
            def pread_into(self, buffer, offset):
                outer.read += len(buffer) if path.suffix == ".safetensors" else 0
                return super().pread_into(buffer, offset)

        return CountingHandle(path, super().open(path, write=write).fd)


def test_a_file_that_nobody_else_wrote_is_not_read_before_it_is_replaced(model, tmp_path, helpers):
    io = Counting()
    tensors = ("head.weight", "half.weight")
    nbytes = sum(model.views[name].nbytes for name in tensors)

    def sync(store):
        for name in tensors:
            model.views[name] += 1
        io.read = 0
        store.sync(model.views, weight_version=1)
        return io.read

    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        assert sync(store) == 0  # hashed when it was cloned
        store.compact()
        assert sync(store) == 0
    with CheckpointStore.open(tmp_path / "c", io=io) as store:
        assert sync(store) == nbytes  # another process: who knows
        store.compact()
        assert sync(store) == 0
        store.compact()
        # Given somebody who writes other contents, and takes care that size and time are the same
        path = store.directory / SHARD
        info, data = path.stat(), bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        # Then it is found before anything is overwritten
        model.views["head.weight"] += 1
        with pytest.raises(CheckpointForeign, match=r"half\.weight differs"):
            sync(store)
        assert path.read_bytes() == bytes(data)
        store.adopt()
        model.views["half.weight"] += 1
        assert sync(store) == 0


def test_blocks_in_place_do_not_make_a_file_known(store, model):
    """Given that only a part of a tensor was looked at, then the rest of it is not taken for granted."""
    path = store.directory / SHARD
    store._known = KnownFiles()
    model.views["head.weight"][0] += 1
    store.sync(model.views, weight_version=1)
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        assert store._known.tensors(SHARD, file.fileno()) == frozenset()
    store.verify()
    model.views["head.weight"][0] += 1
    store.sync(model.views, weight_version=2)
    with path.open("rb") as file:
        known = store._known.tensors(SHARD, file.fileno())
    assert known == {spec.number for spec in store.layout.of_file(SHARD)}
    path.write_bytes(data)
    with path.open("rb") as file:
        assert store._known.tensors(SHARD, file.fileno()) == frozenset()


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP])
def test_streams_hold_what_was_written_on_kernels_that_can_and_cannot(tmp_path, monkeypatch, refused):
    calls = []

    def played(name, original):
        def call(fd, buffers, offset, flags=0):
            calls.append((name, flags))
            if flags and refused:
                raise OSError(refused, "flag")
            return original(fd, buffers, offset)  # without the flag: the file system of the test may not know it

        return call

    for name in ("pwritev", "preadv"):
        monkeypatch.setattr(durable.os, name, played(name, getattr(os, name)))
    data = os.urandom(durable.STREAM + 5)
    with FileIo().create(tmp_path / "file") as handle:
        handle.stream(data, 3)
        handle.stream(b"abc", 0)
        handle.once = True
        found = bytearray(len(data) + 10)
        assert handle.pread_into(memoryview(found), 0) == len(data) + 3
        assert handle.once == (refused is None)
    assert bytes(found[: len(data) + 3]) == b"abc" + data
    flags = {flag for name, flag in calls if name == "pwritev"}
    assert flags == {0, durable.RWF_DONTCACHE}  # the small write stays in the page cache


def test_two_threads_are_refused_the_same_flag(tmp_path, monkeypatch):
    """Undo data is encoded in threads that share a handle: none may take the other's discovery for its own failure."""
    both = threading.Barrier(2)
    original = os.preadv

    def played(fd, buffers, offset, flags=0):
        if flags:
            both.wait(10)
            raise OSError(errno.EOPNOTSUPP, "flag")
        return original(fd, buffers, offset)

    monkeypatch.setattr(durable.os, "preadv", played)
    data = os.urandom(4096)
    with FileIo().create(tmp_path / "file") as handle, ThreadPoolExecutor(2) as pool:
        handle.pwrite(data, 0)
        handle.once = True
        found = [bytearray(4096), bytearray(4096)]
        assert list(pool.map(lambda buffer: handle.pread_into(memoryview(buffer), 0), found)) == [4096, 4096]
        assert found == [data, data]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EAGAIN])  # EAGAIN: OpenZFS, soon after a write
def test_extents_that_can_not_be_shared_now_are_copied(tmp_path, monkeypatch, error):
    def refused(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(durable.fcntl, "ioctl", refused)
    io = FileIo()
    with io.create(tmp_path / "a") as a, io.create(tmp_path / "b") as b:
        assert io.reflink(a, b) is False


def rewritten(path, version, fields):
    """A commit record with another version and other JSON."""
    data = path.read_bytes()
    length, entries, kind = struct.unpack_from("<I", data, 12)[0], *struct.unpack_from("<QI", data, 16)
    text = json.dumps(fields(json.loads(data[32 : 32 + length]))).encode()
    body = struct.pack("<8sIIQII", b"HOGWCMIT", version, len(text), entries, kind, 0) + text + data[32 + length : -16]
    path.write_bytes(body + xxhash.xxh3_128_digest(body))


def test_commit_records_of_version_1_are_read_and_those_of_version_3_are_not(
    store, model, io, generations, helpers, tmp_path
):
    before = on_disk(store, helpers)
    model.views["norm.weight"][0] += 1  # written in place: nothing is deferred
    store.sync(model.views, weight_version=1)
    store.close()

    def without(fields):
        assert fields.pop("deferred") == {}
        return fields

    for path in generations.glob("*.commit"):
        rewritten(path, 1, without)
    with CheckpointStore.open(store.directory, io=io) as again:
        helpers.assert_equal(exported(again, 0, tmp_path, helpers), before)
        replace_shard(model.views)
        assert again.sync(model.views, weight_version=2).generation == 2
    rewritten(generations / "00000002.commit", 3, lambda fields: fields)
    # ... which is no damage: no command may begin anew over it
    with pytest.raises(CheckpointError, match="format version 3") as caught:
        CheckpointStore.open(store.directory, io=io, start_anew=True)
    assert not isinstance(caught.value, CheckpointCorrupt)
