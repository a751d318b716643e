"""The first generation: a copy of the model that is served, sharing its extents where the file system can."""

import fnmatch
import os
import stat
from pathlib import Path

from hogwild.checkpoint.constants import CLONING_MARK, GENERATIONS_DIR, READERS_LOCK, STORE_DIR
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.layout import Layout
from hogwild.errors import CheckpointError, CheckpointLayout

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.safetensors")
"""Not copied: weights in other formats would go stale at the first sync, and a loader might prefer them."""


def check_beginning(directory: Path, source: Path | None) -> None:
    """Raise unless a first generation can be made: from `source`, or (None) from the model in `directory` itself.

    Nothing is written, so that a wrong path leaves nothing behind.
    """
    unfinished = (directory / STORE_DIR / CLONING_MARK).exists()
    if source is None:
        if unfinished:
            raise CheckpointError(f"{directory} is an unfinished copy of a model: open it with that model as source.")
        refuse_links(directory, Layout.read(directory))
        return
    Layout.read(source)
    if directory.exists() and not unfinished and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise CheckpointError(
            f"{directory} holds files already, but no checkpoint of Hogwild's: choose an empty directory, or pass the "
            "same directory as model and checkpoint to work in place."
        )


def make_folders(io: FileIo, directory: Path) -> None:
    """What a checkpoint has besides the model: our folder, and the file that readers lock."""
    if not directory.exists():
        directory.mkdir(parents=True)
        io.fsync_dir(directory.parent)
    store = directory / STORE_DIR
    io.mkdir(store)
    io.mkdir(store / GENERATIONS_DIR)
    if not (store / READERS_LOCK).exists():
        io.create(store / READERS_LOCK).close()
    io.fsync_dir(store)
    io.fsync_dir(directory)


def clone(io: FileIo, source: Path, directory: Path) -> None:
    """Copy the model in `source`: weights of its layout and their companions.

    A copy that was cut short leaves its mark behind and is made again by the next call.
    """
    layout = Layout.read(source)
    need = sum(file.size for file in layout.files)
    store = directory / STORE_DIR
    io.create(store / CLONING_MARK).close()
    io.fsync_dir(store)
    weights = [source / file.name for file in layout.files]
    for path in sorted([*weights, *companions(source, layout)]):
        _copy(io, path, directory / path.name, store / "clone.tmp", need)
    io.fsync_dir(store)
    io.fsync_dir(directory)


def companions(directory: Path, layout: Layout) -> list[Path]:
    """What belongs to a model besides its weights: configuration, tokenizer; no sub-folders, no hidden files."""
    weights = {file.name for file in layout.files}
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in weights
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS)
    )


def _copy(io: FileIo, source: Path, target: Path, temp: Path, need: int) -> None:
    with io.open(source) as old, io.create(temp) as new:
        os.fchmod(new.fd, stat.S_IMODE(os.fstat(old.fd).st_mode) | stat.S_IWUSR)
        if not io.reflink(old, new):
            size = old.size()
            if os.statvfs(temp.parent).f_bavail * os.statvfs(temp.parent).f_frsize < size:
                raise CheckpointError(
                    f"{target.parent} has no room for a copy of the model ({need >> 20} MiB): free some space, or "
                    "point HOGWILD_CHECKPOINT_DIR at another disk or at the model itself."
                )
            io.copy_range(old, new, 0, size)
        new.fsync()
    io.rename(temp, target)


def refuse_links(directory: Path, layout: Layout, *, hard: bool = True) -> None:
    """Raise CheckpointLayout when a weight file is a symbolic or hard link: it belongs to other models too.

    `hard`: False in a checkpoint that exists. A file of it that has a second name (a backup) is never written through.
    """
    for file in layout.files:
        info = (directory / file.name).lstat()
        if stat.S_ISLNK(info.st_mode) or (hard and info.st_nlink > 1):
            raise CheckpointLayout(
                f"{directory / file.name} is a link (a hub cache keeps its files so): syncing would change what it "
                "points to. Point HOGWILD_CHECKPOINT_DIR at a directory of its own; it starts as a copy of the model."
            )
