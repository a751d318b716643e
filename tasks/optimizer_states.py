"""The optimizer's state on disk, a file beside each generation: a restarted worker goes on with the moments it had."""

import logging
import time
from pathlib import Path

from safetensors import SafetensorError

from hogwild.config import LAST_SYNC_RATE, Settings
from hogwild.errors import CheckpointError, DoesNotFit, HogwildError
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer

logger = logging.getLogger(__name__)

# State up to this size is saved within the pause of a sync beside training (a tenth of a second); more of it waits for
# a sync that no job runs beside.
SMALL_STATE = 256 << 20


class OptimizerStates:
    """The files of one served model, named by the weight version that they belong to."""

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.data_dir / "optimizer"
        self._slug = settings.model_slug

    def files(self) -> list[tuple[int, Path]]:
        """(weight version, file), newest first."""
        found = []
        for path in self._directory.glob(f"{self._slug}@*.safetensors"):
            version = path.stem.rpartition("@")[2]
            if version.isdigit():
                found.append((int(version), path))
        return sorted(found, reverse=True)

    def path(self, version: int) -> Path:
        """Where the state of that weight version is, or would be."""
        return self._directory / f"{self._slug}@{version}.safetensors"

    def save(self, trainer: Trainer | None, version: int, *, all_sizes: bool) -> list[Path]:
        """Returns the files that this replaces, to be removed when the generation is there. Raises CheckpointError."""
        if trainer is None or trainer.optimizer is None:
            return []
        if not all_sizes and trainer.optimizer.allocated_bytes() > SMALL_STATE:
            return []
        path = self.path(version)
        try:
            trainer.save_optimizer(path)
        except SafetensorError as error:  # how safetensors reports a full disk, among others
            raise CheckpointError(f"the optimizer's state can't be written to {path}: {error}") from error
        return [old for _, old in self.files() if old != path]

    def save_last(self, trainer: Trainer, version: int, until: float) -> None:
        """`save`, if it is not there and time is left until then (of the monotonic clock); failures are logged."""
        if trainer.optimizer is None or self.path(version).exists():
            return
        seconds = trainer.optimizer.allocated_bytes() / LAST_SYNC_RATE
        if seconds > until - time.monotonic():
            logger.warning("no time is left for the optimizer's state: the next job begins with an older one, or none")
            return
        try:
            for path in self.save(trainer, version, all_sizes=True):
                path.unlink(missing_ok=True)
        except Exception:
            logger.exception("the optimizer's state was not saved: the next job begins with an older one, or none")

    def load(self, trainer: Trainer, config: TrainConfig, *, oldest: int, newest: int) -> None:
        """The newest state of a weight version between the two. What can't be used is logged, and it starts empty.

        Raises DoesNotFit: the state is good, and not given up because something else has the memory at the moment.
        """
        usable = [(version, path) for version, path in self.files() if oldest <= version <= newest]
        for version, path in usable[:1]:
            try:
                trainer.load_optimizer(path, config)
            except DoesNotFit:
                raise
            except HogwildError as error:
                logger.info("optimizer state starts empty: %s", error)
            else:
                logger.info("optimizer state of weight version %d restored", version)
