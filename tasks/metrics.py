"""Counters that the ledger's scripts and the worker keep in Redis, for /metrics."""

from dataclasses import dataclass

from hogwild.tasks.connections import Client
from hogwild.tasks.keys import Keys

STEP_BUCKETS = ("0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60")  # seconds; the APPLIED script has the same


@dataclass(frozen=True)
class SyncFigures:
    """What one sync or rollback of the checkpoint wrote and cost."""

    bytes_written: int
    seconds: float
    pause_seconds: float  # of it, while training waited
    undo_bytes: int = 0
    blocks_changed: int = 0


def record_sync(client: Client, model: str, figures: SyncFigures) -> None:
    """Called by the worker after a committed sync or rollback; without changed blocks it made no generation."""
    key = Keys(model)("counters")
    pipe = client.pipeline(transaction=True)
    pipe.hincrby(key, "syncs", 1 if figures.blocks_changed else 0)
    pipe.hincrby(key, "sync_bytes", figures.bytes_written)
    pipe.hincrby(key, "sync_undo_bytes", figures.undo_bytes)
    pipe.hincrby(key, "sync_blocks", figures.blocks_changed)
    pipe.hincrbyfloat(key, "sync_seconds", figures.seconds)
    pipe.hincrbyfloat(key, "sync_pause_seconds", figures.pause_seconds)
    pipe.execute()


def record_failed_sync(client: Client, model: str) -> None:
    """Called by the worker after a sync that failed, on demand or due."""
    client.hincrby(Keys(model)("counters"), "syncs_failed", 1)


def record_undo(client: Client, model: str, nbytes: int) -> None:
    """Called by the worker after it made undo data of files that a sync had replaced."""
    client.hincrby(Keys(model)("counters"), "sync_undo_bytes", nbytes)


def counters(client: Client, model: str) -> dict[str, float]:
    """All counters; those that never counted are absent."""
    return {name.decode(): float(value) for name, value in client.hgetall(Keys(model)("counters")).items()}
