"""The power goes at every write, fsync, rename and unlink of a sync: what is left is generation n−1 or n, bit for bit.

`Recorder` performs the real operations and writes them down. For every prefix of that log `disk_after` builds a
directory as a disk that lost power there may have kept it:

- data written since a file's last fsync: dropped, kept, or torn at any byte, what was being written in the 512-byte
  sector at the tear turned into garbage now and then; each write on its own, so later ones may survive earlier ones.
  Bytes outside the range that was written stay as they were (what SQLite calls powersafe overwrite);
- names created, renamed or removed since the folder's last fsync: each may be there or not, as long as the operations
  on one name happen in order. A rename is atomic, which is all that POSIX promises.
"""

import contextlib
import itertools
import random
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import CheckpointError

DROP, KEEP = "drop", "keep"
VARIANTS = [DROP, KEEP, 1, 2, 3, 4]  # the numbers seed a random choice for each operation


@dataclass
class Node:
    """A file: what is surely on the medium, and what was written since."""

    durable: bytes = b""


class Killed(BaseException):
    """Nothing that the process wanted to do afterwards is done, its clearing up included."""


@dataclass
class Log:
    """What happened, in order, from a given state of the folder on."""

    root: Path
    names: dict[str, Node] = field(default_factory=dict)  # durable at the start
    live: dict[str, Node] = field(default_factory=dict)  # as the process sees it
    ops: list[tuple] = field(default_factory=list)
    mutex: threading.Lock = field(default_factory=threading.Lock)
    kill_at: int = 1_000_000  # the process is killed behind so many operations

    @classmethod
    def start(cls, root: Path) -> "Log":
        names = {str(path.relative_to(root)): Node(path.read_bytes()) for path in root.rglob("*") if path.is_file()}
        return cls(root, names, dict(names))

    def alive(self) -> None:
        """Before each operation: raises Killed."""
        if len(self.ops) >= self.kill_at:
            raise Killed

    def add(self, *op: object) -> None:
        with self.mutex:
            self.ops.append(op)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


class RecordedHandle(Handle):
    """A file whose writes are written down."""

    def __init__(self, path: Path, fd: int, log: Log, node: Node) -> None:
        super().__init__(path, fd)
        self.log, self.node = log, node

    def pwrite(self, data, offset):
        self.log.alive()
        super().pwrite(data, offset)
        self.log.add("write", self.node, offset, bytes(data))

    def stream(self, data, offset):
        self.pwrite(data, offset)

    def fsync(self):
        self.log.alive()
        self.log.add("fsync", self.node)


class Recorder(FileIo):
    """The real operations, written down. With `reflinks`, a file system that can share extents is played."""

    def __init__(self, root: Path, *, reflinks: bool = False) -> None:
        self.log = Log.start(root)
        self.reflinks = reflinks

    def create(self, path, mode=0o644):
        self.log.alive()
        name = self.log.name(path)
        fd = super().create(path, mode).fd
        if name in self.log.live:
            self.log.add("truncate", self.log.live[name], 0)
        else:
            self.log.live[name] = Node()
            self.log.add("link", name, self.log.live[name])
        return RecordedHandle(path, fd, self.log, self.log.live[name])

    def open(self, path, *, write=False):
        fd = super().open(path, write=write).fd
        if self.log.root not in path.parents:
            return Handle(path, fd)
        return RecordedHandle(path, fd, self.log, self.log.live[self.log.name(path)])

    def link(self, source, target):
        self.log.alive()
        super().link(source, target)
        node = self.log.live[self.log.name(source)]
        self.log.live[self.log.name(target)] = node
        self.log.add("link", self.log.name(target), node)

    def rename(self, source, target):
        self.log.alive()
        super().rename(source, target)
        a, b = self.log.name(source), self.log.name(target)
        self.log.live[b] = self.log.live.pop(a)
        self.log.add("rename", a, b)

    def unlink(self, path):
        self.log.alive()
        existed = path.exists()
        super().unlink(path)
        if existed:
            del self.log.live[self.log.name(path)]
            self.log.add("unlink", self.log.name(path))

    def fsync_dir(self, path):
        self.log.alive()
        if path == self.log.root or self.log.root in path.parents:
            self.log.add("fsync_dir", str(path.relative_to(self.log.root)))

    def reflink(self, source, target):
        if self.reflinks:
            target.pwrite(source.pread(source.size(), 0), 0)
        return self.reflinks

    def copy_range(self, source, target, offset, length):
        if length:
            target.pwrite(source.pread(length, offset), offset)


def disk_after(log: Log, count: int, variant: str | int) -> dict[str, bytes]:
    """Name → contents after a power cut behind the first `count` operations."""
    rng = random.Random(f"{variant}/{count}")
    pending_names: list[tuple] = []
    pending_data: dict[int, list[tuple]] = {}
    durable: dict[int, bytes] = {}
    nodes: dict[int, Node] = {}
    names = dict(log.names)

    def content(node: Node) -> bytes:
        return durable.get(id(node), node.durable)

    for op in log.ops[:count]:
        match op:
            case ("write" | "truncate", node, *_):
                nodes[id(node)] = node
                pending_data.setdefault(id(node), []).append(op)
            case ("fsync", node):
                durable[id(node)] = replay(content(node), pending_data.pop(id(node), []), KEEP, rng)
            case ("fsync_dir", folder):
                apply_names(names, pending_names, lambda op, folder=folder: touches(op, folder))
            case _:
                pending_names.append(op)
    choice = {DROP: lambda op: False, KEEP: lambda op: True}.get(variant, lambda op: rng.random() < 0.5)
    apply_names(names, pending_names, choice)
    return {name: replay(content(node), pending_data.get(id(node), []), variant, rng) for name, node in names.items()}


def touches(op: tuple, folder: str) -> bool:
    return any(str(Path(name).parent) == folder for name in op[1:] if isinstance(name, str))


def apply_names(names: dict[str, Node], pending: list[tuple], chosen) -> None:
    """Make the chosen operations on names durable; one that waits for an earlier one on the same name waits on."""
    left: list[tuple] = []
    blocked: set[str] = set()
    for op in pending:
        mine = {name for name in op[1:] if isinstance(name, str)}
        if mine & blocked or not chosen(op):
            left.append(op)
            blocked |= mine
        elif op[0] == "link":
            names[op[1]] = op[2]
        elif op[0] == "rename":
            names[op[2]] = names.pop(op[1])
        else:
            del names[op[1]]
    pending[:] = left


def replay(content: bytes, ops: list[tuple], variant: str | int, rng: random.Random) -> bytes:
    """Contents with some of the writes that were not synced."""
    data = bytearray(content)
    for op in ops:
        if variant == DROP:
            break
        fate = "keep" if variant == KEEP else rng.choice(["keep", "drop", "head", "tail", "sectors"])
        if fate == "drop":
            continue
        if op[0] == "truncate":
            del data[op[2] :]
            continue
        _, _, offset, new = op
        if len(data) < offset + len(new):
            data.extend(bytes(offset + len(new) - len(data)))
        cut = rng.randrange(len(new) + 1) if new else 0
        if fate == "keep":
            data[offset : offset + len(new)] = new
        elif fate == "head":
            data[offset : offset + cut] = new[:cut]
        elif fate == "tail":
            data[offset + cut : offset + len(new)] = new[cut:]
        else:
            for start in range(0, len(new), 512):
                if rng.random() < 0.5:
                    data[offset + start : offset + start + len(new[start : start + 512])] = new[start : start + 512]
        if fate in ("head", "tail") and rng.random() < 0.3:
            sector = (offset + cut) // 512 * 512
            stop = min(sector + 512, offset + len(new))  # a drive spoils the sector it was writing, nothing else
            data[max(sector, offset) : stop] = rng.randbytes(max(0, stop - max(sector, offset)))
    return bytes(data)


def write_out(state: dict[str, bytes], target: Path) -> Path:
    """Put a state of the disk into a folder."""
    for folder in ("", ".hogwild", ".hogwild/generations"):
        (target / folder).mkdir(exist_ok=True)
    for name, content in state.items():
        (target / name).write_bytes(content)
    return target


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.fixture
def cut_everywhere(tmp_path, io):
    """Cut the power after every operation in a log, in every variant, and look at what `check` finds."""
    counter = iter(range(1_000_000))

    def cut(log: Log, check, variants=VARIANTS) -> int:
        for count in range(len(log.ops) + 1):
            for variant in variants:
                folder = tmp_path / f"cut{next(counter)}"
                folder.mkdir()
                where = f"after operation {count} of {len(log.ops)} ({log.ops[count - 1][0]}), {variant}"
                try:
                    check(write_out(disk_after(log, count, variant), folder))
                except BaseException as error:
                    error.add_note(where)
                    raise
        return len(log.ops)

    return cut


def change(views: dict[str, torch.Tensor], version: int) -> None:
    """Some blocks of the first shard, nearly all of the second: both ways of writing in one sync."""
    views["embed.weight"][version * 7] += version
    views["layer.down.weight"][:3] += 0.25
    views["norm.weight"][version] = version
    views["head.weight"].mul_(1.01 + version)
    views["half.weight"].neg_()


@pytest.fixture
def two_generations(model, tmp_path, io):
    """A checkpoint with generations 0 and 1, its directory, and the files of each."""
    directory = tmp_path / "checkpoint"
    with CheckpointStore.open(directory, source=model.directory, io=io) as store:
        contents = {0: shards(directory)}
        change(model.views, 1)
        store.sync(model.views, weight_version=1)
        contents[1] = shards(directory)
    return directory, contents


def checker(contents, model, io, seen, allowed):
    """A check: a known generation, provable, and every few times that it can go back and go on."""
    calls = iter(range(1_000_000))

    def check(folder: Path) -> None:
        with CheckpointStore.open(folder, io=io) as store:
            head = store.head.generation
            assert head in allowed
            assert shards(folder) == contents[head]
            assert store.verify().ok
            seen.add(head)
            left = {path.suffix for path in (folder / ".hogwild/generations").iterdir()}
            assert left <= {".commit", ".undo"}
            if next(calls) % 5:
                return
            earlier = store.generations()[-2].generation
            store.rollback(earlier)
            assert shards(folder) == contents[earlier]
            store.sync(model.views, weight_version=99)
            assert store.verify(model.views).ok

    return check


@pytest.mark.parametrize("reflinks", [False, True])
def test_power_cut_anywhere_in_a_sync(two_generations, model, io, cut_everywhere, reflinks):
    directory, contents = two_generations
    recorder = Recorder(directory, reflinks=reflinks)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
        assert store.compact()
    contents[2] = shards(directory)
    seen: set[int] = set()
    assert cut_everywhere(recorder.log, checker(contents, model, io, seen, {1, 2})) > 15
    assert seen == {1, 2}


def restored(store: CheckpointStore, folder: Path) -> dict[int, dict[str, bytes]]:
    """The weight files of every generation that is kept."""
    found = {}
    for commit in store.generations():
        target = folder.with_name(f"{folder.name}-{commit.generation}")
        store.export(target, commit.generation)
        found[commit.generation] = shards(target)
        shutil.rmtree(target)
    return found


@pytest.mark.parametrize("by", ["compact", "the next sync", "the next open"])
def test_power_cut_anywhere_while_undo_data_is_made(two_generations, model, io, cut_everywhere, by):
    """Every kept generation comes back bit for bit, before the repair as after it, and none is lost."""
    directory, contents = two_generations
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
        contents[2] = shards(directory)
        recorder.log = Log.start(directory)
        if by == "compact":
            assert store.compact()
        elif by == "the next sync":
            change(model.views, 3)
            store.sync(model.views, weight_version=3)
            contents[3] = shards(directory)
    if by == "the next open":
        CheckpointStore.open(directory, io=recorder).close()
    assert {name for name in recorder.log.live if "00000002" in name} == {
        ".hogwild/generations/00000002.commit", ".hogwild/generations/00000002.undo"
    }  # fmt: skip

    def check(folder: Path) -> None:
        with CheckpointStore.open(folder, io=io, read_only=True, reader_patience=0) as reader:
            head = reader.head.generation
            with contextlib.suppress(CheckpointError):  # a reader is told when a sync has to be finished first
                assert restored(reader, folder) == {n: contents[n] for n in range(head + 1)}
                read.append(head)
        with CheckpointStore.open(folder, io=io) as store:
            assert store.head.generation == head
            assert restored(store, folder) == {n: contents[n] for n in range(head + 1)}
            left = {path.suffix for path in (folder / ".hogwild/generations").iterdir()}
            assert left <= {".commit", ".undo"}
            assert store.verify().ok

    read: list[int] = []
    assert cut_everywhere(recorder.log, check) >= 7
    assert set(read) == set(list(contents)[2:])


def test_power_cut_anywhere_in_a_rollback(two_generations, model, io, cut_everywhere):
    directory, contents = two_generations
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        store.rollback(0)
    contents[2] = shards(directory)
    assert contents[2] == contents[0]
    seen: set[int] = set()
    cut_everywhere(recorder.log, checker(contents, model, io, seen, {1, 2}))
    assert seen == {1, 2}


def test_power_cut_again_while_the_first_one_is_repaired(two_generations, model, io, tmp_path, cut_everywhere):
    directory, contents = two_generations
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
        assert store.compact()
    contents[2] = shards(directory)
    seen: set[int] = set()
    committed = next(i for i, op in enumerate(recorder.log.ops) if op[0] == "rename" and op[2].endswith(".commit"))
    repairs = 0
    for count in range(committed - 2, len(recorder.log.ops), 2):
        folder = tmp_path / f"first{count}"
        folder.mkdir()
        write_out(disk_after(recorder.log, count, 5), folder)
        second = Recorder(folder)
        with CheckpointStore.open(folder, io=second):
            repairs += any(op[0] in ("write", "rename") for op in second.log.ops)
        cut_everywhere(second.log, checker(contents, model, io, seen, {1, 2}), variants=[DROP, 6])
    assert repairs > 3
    assert seen == {1, 2}


def test_power_cut_while_a_checkpoint_is_opened_whose_writer_was_killed(two_generations, model, io, tmp_path):
    """What the killed writer had done is seen by the next one, and still need not be on the disk."""
    directory, contents = two_generations
    change(model.views, 2)
    with CheckpointStore.open(shutil.copytree(directory, tmp_path / "all"), io=io) as store:
        store.sync(model.views, weight_version=2)
    contents[2] = shards(tmp_path / "all")
    seen: set[int] = set()
    for killed_at in itertools.count():
        folder = shutil.copytree(directory, tmp_path / f"killed{killed_at}")
        recorder = Recorder(folder)
        store = CheckpointStore.open(folder, io=recorder)
        recorder.log = Log.start(folder)
        recorder.log.kill_at = killed_at
        with contextlib.suppress(Killed):
            store.sync(model.views, weight_version=2)
            store.compact()
        finished = len(recorder.log.ops) < killed_at
        recorder.log.kill_at = len(recorder.log.ops)
        with contextlib.suppress(Killed):
            store.close()
        recorder.log.kill_at = 1_000_000
        CheckpointStore.open(folder, io=recorder).close()
        for count in range(killed_at, len(recorder.log.ops) + 1):
            cut = tmp_path / f"killed{killed_at}-{count}"
            cut.mkdir()
            write_out(disk_after(recorder.log, count, 1 if count % 4 == 3 else DROP), cut)
            with CheckpointStore.open(cut, io=io) as again:
                assert again.head.generation in (1, 2)
                assert shards(cut) == contents[again.head.generation], f"killed at {killed_at}, cut at {count}"
                assert restored(again, cut) == {n: contents[n] for n in range(again.head.generation + 1)}
                seen.add(again.head.generation)
            shutil.rmtree(cut)
        if finished:
            break
    assert killed_at > 15
    assert seen == {1, 2}


def test_power_cut_anywhere_in_the_first_copy(model, tmp_path, io, cut_everywhere):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    recorder = Recorder(directory)
    CheckpointStore.open(directory, source=model.directory, io=recorder).close()
    contents = {0: shards(model.directory)}

    def check(folder: Path) -> None:
        with CheckpointStore.open(folder, source=model.directory, io=io) as store:
            assert store.head.generation == 0
            assert shards(folder) == contents[0]
            assert (folder / "config.json").read_bytes() == (model.directory / "config.json").read_bytes()
            assert store.verify(model.views).ok

    cut_everywhere(recorder.log, check)


def test_power_cut_anywhere_while_generations_are_pruned(model, tmp_path, io, cut_everywhere):
    directory = tmp_path / "checkpoint"
    contents = {}
    with CheckpointStore.open(directory, source=model.directory, keep_last=2, io=io) as store:
        contents[0] = shards(directory)
        for version in range(1, 5):
            change(model.views, version)
            store.sync(model.views, weight_version=version)
            contents[version] = shards(directory)
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder, keep_last=2) as store:
        recorder.log = Log.start(directory)
        change(model.views, 5)
        store.sync(model.views, weight_version=5)
        store.compact()
        contents[5] = shards(directory)
    assert any(op[0] == "unlink" and op[1].endswith(".commit") for op in recorder.log.ops)
    seen: set[int] = set()
    cut_everywhere(recorder.log, checker(contents, model, io, seen, {4, 5}), variants=[DROP, KEEP, 1, 2])
    assert seen == {4, 5}


def test_power_cut_anywhere_while_foreign_files_are_adopted(two_generations, model, io, cut_everywhere):
    directory, contents = two_generations
    name = "model-00001-of-00002.safetensors"
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        with recorder.open(directory / name, write=True) as somebody:  # who does not wait for the disk
            somebody.pwrite(bytes(100), somebody.size() - 100)
        contents[2] = shards(directory)
        assert store.adopt().generation == 2
    seen: set[int] = set()

    def check(folder: Path) -> None:
        with CheckpointStore.open(folder, io=io) as store:
            seen.add(store.head.generation)
            if store.head.generation == 2:
                assert shards(folder) == contents[2]
                assert store.verify().ok
            store.adopt()
            store.sync(model.views, weight_version=99)
            assert store.verify(model.views).ok

    cut_everywhere(recorder.log, check)
    assert seen == {1, 2}


def test_power_cut_anywhere_while_a_checkpoint_with_a_damaged_record_is_begun_anew(
    two_generations, model, io, cut_everywhere
):
    directory, contents = two_generations
    record = directory / ".hogwild/generations/00000001.commit"
    record.write_bytes(record.read_bytes()[:-1])
    recorder = Recorder(directory)
    recorder.log = Log.start(directory)
    with CheckpointStore.open(directory, io=recorder, start_anew=True) as store:
        assert store.lost == (0, 1)
    seen: set[int] = set()

    def check(folder: Path) -> None:
        assert shards(folder) == contents[1]
        with CheckpointStore.open(folder, io=io, start_anew=True) as store:
            seen.add(len(store.lost))
            assert store.head.generation == 2
            assert store.verify().ok
            store.sync(model.views, weight_version=99)
            assert store.verify(model.views).ok

    cut_everywhere(recorder.log, check)
    assert seen == {0, 2}


def test_the_simulated_power_cut_does_tear(two_generations, model, io, tmp_path):
    """A store that wrote in place without a redo file would be caught: torn blocks do occur in these disks."""
    directory, contents = two_generations
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
    after = shards(directory)
    name = "model-00001-of-00002.safetensors"
    torn = 0
    for count in range(len(recorder.log.ops)):
        for variant in VARIANTS:
            found = disk_after(recorder.log, count, variant)[name]
            torn += found not in (contents[1][name], after[name])
    assert torn > 5


def test_a_finished_redo_file_of_a_lost_commit_is_not_applied(two_generations, model, io, tmp_path):
    directory, contents = two_generations
    with CheckpointStore.open(directory, io=io) as store:
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
        store.compact()
    undo = directory / ".hogwild/generations/00000002.undo"
    assert undo.exists()
    write_out({**contents[1]}, directory)
    (directory / ".hogwild/generations/00000002.commit").unlink()
    with CheckpointStore.open(directory, io=io) as store:
        assert store.head.generation == 1
        assert store.verify().ok
        assert not undo.exists()


def test_a_damaged_redo_file_is_refused(two_generations, model, io):
    directory, _ = two_generations
    recorder = Recorder(directory)
    with CheckpointStore.open(directory, io=recorder) as store:
        recorder.log = Log.start(directory)
        change(model.views, 2)
        store.sync(model.views, weight_version=2)
    committed = next(i for i, op in enumerate(recorder.log.ops) if op[0] == "rename" and op[2].endswith(".commit"))
    write_out(disk_after(recorder.log, committed + 2, KEEP), directory)
    redo = directory / ".hogwild/generations/00000002.redo"
    data = bytearray(redo.read_bytes())
    data[len(data) // 2] ^= 1
    redo.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        CheckpointStore.open(directory, io=io)
