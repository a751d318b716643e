"""Disk, fingerprints and live weights held against each other, and live weights brought back to what the disk says."""

from collections.abc import Callable
from pathlib import Path

from hogwild.checkpoint import views as live
from hogwild.checkpoint.blockfile import read_blocks
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table, differing, fingerprints
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.views import Views
from hogwild.errors import CheckpointForeign


def live_differences(spec: TensorSpec, views: Views, table: Table) -> Indices:
    """Numbers of the blocks of a live view that differ from `table`."""
    rows = table[spec.first_block : spec.first_block + spec.blocks]
    return differing(live.view_fingerprints(spec, views[spec.name]), rows)


def compare_live(layout: Layout, views: Views, table: Table) -> tuple[int, dict[str, int]]:
    """(blocks looked at, tensor name → blocks that differ from `table`) of live weights."""
    live.check_views(layout, views)
    specs = [spec for spec in layout.tensors if spec.name in views]
    counts = {spec.name: len(live_differences(spec, views, table)) for spec in specs}
    return sum(spec.blocks for spec in specs), {name: count for name, count in counts.items() if count}


def restore_live(
    io: FileIo, directory: Path, layout: Layout, table: Table, views: Views, writing: Callable[[], None]
) -> tuple[int, list[str]]:  # blocks written, names of the tensors
    """Write into `views` every block that differs from `table`, from the files, in place; first calls `writing`.

    Raises CheckpointForeign when the files are not what `table` says; such a block is never written into live weights.
    """
    live.check_views(layout, views)
    blocks = 0
    names: list[str] = []
    for file in layout.files:
        with io.open(directory / file.name) as handle:
            for spec in layout.of_file(file.name):
                if spec.name not in views:
                    continue
                wrong = live_differences(spec, views, table)
                if not len(wrong):
                    continue

                def read(numbers: Indices, spec: TensorSpec = spec) -> Bytes:
                    data = read_blocks(handle, spec, numbers)
                    if len(differing(fingerprints(data), table[spec.first_block + numbers])):
                        raise CheckpointForeign(
                            f"{spec.name} on disk is not what the last generation says: it was not loaded. Run "
                            "`hogwild checkpoint verify`.",
                            tensor=spec.name,
                        )
                    return data

                if not names:
                    writing()
                live.write_blocks(spec, views[spec.name], wrong, read)
                blocks += len(wrong)
                names.append(spec.name)
    return blocks, names
