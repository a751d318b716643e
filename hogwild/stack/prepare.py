"""Make the checkpoint directory ready to be served: clone the model once, finish or undo a sync that was cut short.

Run by `hogwild up` before vLLM starts: python -m hogwild.stack.prepare SOURCE TARGET KEEP_LAST
"""

import sys
from pathlib import Path

from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import HogwildError

if __name__ == "__main__":
    source, target, keep_last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    try:
        CheckpointStore.open(target, source=source, keep_last=keep_last).close()
    except (HogwildError, OSError) as error:
        sys.exit(f"{target}: {error}")
