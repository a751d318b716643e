"""What the store answers."""

from dataclasses import dataclass, field

from hogwild.errors import CheckpointCorrupt, CheckpointError


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One sync. With nothing changed, no generation is made and `generation` is the last one."""

    generation: int
    weight_version: int
    jobs: tuple[str, ...]
    blocks_changed: int
    blocks_total: int
    bytes_changed: int
    bytes_written: int  # to the disk, logs included
    undo_bytes: int  # of files that were replaced, undo data is made later: CheckpointStore.compact
    seconds: float  # all of it, the pause included
    pause_seconds: float  # fingerprints and the copy of changed blocks: training waits for this alone
    durable_seconds: float  # until a power cut could not lose it any more
    applied: bool  # False: a reader held the files; they are brought up to date by `finish`, the next sync or open


@dataclass(frozen=True, kw_only=True)
class RollbackReport:
    """A rollback: a new generation with the contents of an old one."""

    generation: int
    restored: int
    weight_version: int
    blocks_changed: int  # on disk
    live_blocks_changed: int  # in the live weights
    tensors: tuple[str, ...]  # whose contents changed, on disk or live
    bytes_written: int
    seconds: float
    pause_seconds: float  # writing into the live weights


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """Live weights made equal to the checkpoint."""

    generation: int
    blocks_changed: int
    tensors: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Blocks that are not what the last generation says: tensor name → number of blocks.

    Where `headers` names files whose tensors or metadata are others, no block was looked at: numbers mean nothing then.
    Live weights that were trained since are meant to differ.
    """

    generation: int
    blocks_checked: int = 0
    live_blocks_checked: int = 0
    disk: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    seconds: float = 0.0
    weight_version: int = 0  # of the generation
    live_version: int | None = None  # of the live weights, where that was said

    @property
    def unsaved(self) -> bool:
        """Whether the live weights have steps that the generation has not."""
        return self.live_version is not None and self.live_version != self.weight_version

    @property
    def ok(self) -> bool:
        """Whether everything agreed that has to."""
        return not self.disk and not self.headers and (not self.live or self.unsaved)

    def raise_for_mismatch(self) -> None:
        """Raise CheckpointCorrupt, naming tensors, unless everything agreed that has to.

        CheckpointError where only live weights differ that are to be the generation.
        """
        if self.headers:
            raise CheckpointCorrupt(
                f"the tensors or the metadata in {', '.join(self.headers)} are not those of generation "
                f"{self.generation}.",
                files=list(self.headers),
            )
        if self.disk:
            raise CheckpointCorrupt(f"{self._differing('on disk', self.disk)}.", tensors=self.disk)
        if self.live and not self.unsaved:
            raise CheckpointError(
                f"{self._differing('in the live weights', self.live)}. No step was counted since: part of an "
                "interrupted one is in them, or something else wrote to them. `hogwild checkpoint save` makes them a "
                f"generation, `hogwild rollback {self.generation}` brings back the saved one.",
                tensors=self.live,
            )

    def _differing(self, where: str, found: dict[str, int]) -> str:
        names = ", ".join(list(found)[:5]) + ("" if len(found) <= 5 else f" and {len(found) - 5} more")
        return f"{sum(found.values())} blocks {where} differ from generation {self.generation}: {names}"
