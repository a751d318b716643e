"""What the `prepare` container runs: makes the checkpoint directory of the settings ready to be served.

    python3 prepare.py MODEL

A second `docker compose up` runs it again beside the worker, which keeps the checkpoint then: nothing is to be done.
"""

import sys
from pathlib import Path

from hogwild.checkpoint.store import CheckpointStore
from hogwild.config import load_settings
from hogwild.errors import CheckpointInUse, HogwildError

if __name__ == "__main__":
    source = Path(sys.argv[1])
    try:
        target = load_settings().model_checkpoint_dir
        try:
            # What is to be forgotten the worker says.
            CheckpointStore.open(target, source=source, keep_last=sys.maxsize).close()
        except CheckpointInUse:
            CheckpointStore.open(target, source=source, read_only=True).close()
    except (HogwildError, OSError) as error:
        sys.exit(f"{error}")
