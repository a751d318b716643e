"""Scattered blocks in one system call, and what becomes of those that it does not do."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hogwild.checkpoint import together as batches
from hogwild.checkpoint.durable import Handle
from hogwild.checkpoint.store import CheckpointStore
from hogwild.checkpoint.together import DEPTH, READ, WRITE, Pieces, together

SIZE = 4096
COUNT = 2 * DEPTH + 30


@pytest.fixture
def file(tmp_path):
    """Random bytes, and a handle on them."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(4 * COUNT * SIZE))
    with Handle(path, os.open(path, os.O_RDWR)) as handle:
        yield handle


def scattered(count: int = COUNT) -> Pieces:
    """Pieces of different sizes, at places that are no multiples of anything."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 2 * SIZE, count)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    return Pieces(starts, sizes, np.sort(rng.choice(2 * COUNT, count, replace=False)) * 2 * SIZE + 123)


def expected(contents: bytes, pieces: Pieces) -> bytes:
    return b"".join(contents[offset : offset + size] for _, size, offset in pieces)


def works_here() -> bool:
    try:
        batches._Queue()
    except OSError:
        return False
    return True


@pytest.fixture(params=["together", "no queue", "not submitted", "some fail"])
def kernel(request, monkeypatch):
    """The kernel as it is, and as it may be elsewhere."""
    run = batches._Queue.run

    def refused():
        raise OSError(errno.ENOSYS, "io_setup")

    def some(queue, count):
        results = run(queue, count)
        results[::3] = -errno.EAGAIN
        results[1::3] -= 1  # done in part
        return results

    monkeypatch.setattr(batches, "_idle", [])
    if request.param == "no queue":
        monkeypatch.setattr(batches, "_Queue", refused)
    elif request.param == "not submitted":
        monkeypatch.setattr(batches._Queue, "run", lambda queue, count: np.full(count, -errno.EOPNOTSUPP))
    elif request.param == "some fail":
        monkeypatch.setattr(batches._Queue, "run", some)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("count", [1, 7, 8, DEPTH, DEPTH + 3, COUNT])
def test_pieces_are_read_and_written(file, count):
    pieces, before = scattered(count), file.path.read_bytes()
    out = np.zeros(int(pieces.sizes.sum()), np.uint8)
    assert file.pread_pieces(out, pieces)
    assert out.tobytes() == expected(before, pieces)
    new = np.frombuffer(np.random.default_rng(3).bytes(len(out)), np.uint8)
    file.pwrite_pieces(new, pieces)
    after = file.path.read_bytes()
    assert expected(after, pieces) == new.tobytes()
    wanted = bytearray(before)
    for start, size, offset in pieces:
        wanted[offset : offset + size] = new[start : start + size].tobytes()
    assert after == wanted  # and nothing else was touched


@pytest.mark.usefixtures("kernel")
def test_a_file_that_is_too_short_is_noticed(file):
    pieces = scattered()
    os.truncate(file.path, int(pieces.offsets[-1] + pieces.sizes[-1] - 1))
    assert not file.pread_pieces(np.zeros(int(pieces.sizes.sum()), np.uint8), pieces)


def test_errors_of_the_plain_call_are_raised(file, tmp_path):
    pieces = scattered()
    with Handle(file.path, os.open(file.path, os.O_RDONLY)) as handle, pytest.raises(OSError) as caught:
        handle.pwrite_pieces(np.zeros(int(pieces.sizes.sum()), np.uint8), pieces)
    assert caught.value.errno == errno.EBADF


@pytest.mark.skipif(not works_here(), reason="the kernel has no native AIO")
def test_nothing_is_left_to_be_done_one_by_one(file):
    pieces = scattered()
    data = np.zeros(int(pieces.sizes.sum()), np.uint8)
    assert not len(together(file.fd, READ, data, pieces).sizes)
    assert not len(together(file.fd, WRITE, data, pieces).sizes)


def test_whoever_overrides_a_call_sees_every_piece(file):
    seen = []

    class Watched(Handle):
        def pwrite(self, data, offset):
            seen.append((len(data), offset))
            super().pwrite(data, offset)

        def pread_into(self, buffer, offset):
            seen.append((len(buffer), offset))
            return super().pread_into(buffer, offset)

    pieces = scattered()
    data = np.zeros(int(pieces.sizes.sum()), np.uint8)
    watched = Watched(file.path, file.fd)
    for method in (watched.pread_pieces, watched.pwrite_pieces):
        seen.clear()
        method(data, pieces)
        assert seen == list(zip(pieces.sizes.tolist(), pieces.offsets.tolist(), strict=True))


def test_threads_do_not_share_a_queue(file):
    pieces, contents = scattered(), file.path.read_bytes()
    wrong = []

    def work():
        for _ in range(20):
            out = np.zeros(int(pieces.sizes.sum()), np.uint8)
            if not file.pread_pieces(out, pieces) or out.tobytes() != expected(contents, pieces):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("kernel")
def test_a_sync_of_scattered_blocks_and_a_rollback(tmp_path, io, helpers):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    views = {"weight": torch.arange(600 * SIZE // 2 + 700, dtype=torch.int16)}
    save_file(views, tmp_path / "model" / "model.safetensors")
    first = views["weight"].clone()
    with CheckpointStore.open(tmp_path / "checkpoint", source=tmp_path / "model", io=io) as store:
        views["weight"][10 :: 10 * SIZE // 2] += 1
        views["weight"][-1] += 1
        assert store.sync(views, weight_version=1).blocks_changed == 61
        helpers.assert_equal(helpers.weights_on_disk(tmp_path / "checkpoint"), views)
        store.rollback(0, views, weight_version=2)
        helpers.assert_equal(helpers.weights_on_disk(tmp_path / "checkpoint"), {"weight": first})
        assert torch.equal(views["weight"], first) and store.verify(views).ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_was_forked_reads_too(file):
    pieces, contents = scattered(), file.path.read_bytes()
    out = np.zeros(int(pieces.sizes.sum()), np.uint8)
    assert file.pread_pieces(out, pieces)  # there is a queue now, which a child does not inherit
    child = os.fork()
    if not child:
        out[:] = 0
        os._exit(0 if file.pread_pieces(out, pieces) and out.tobytes() == expected(contents, pieces) else 1)
    assert os.waitpid(child, 0)[1] == 0
