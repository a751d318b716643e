"""Numbers and names of the on-disk format (docs/checkpoint-format.md), each with its reason."""

from typing import Final

BLOCK: Final = 4096
"""Bytes of a tensor's contiguous checkpoint bytes that share one fingerprint: a memory page, and what an SSD writes."""

FRAME_BLOCKS: Final = 1024
"""Most blocks in one frame of an undo or redo file: 4 MiB, large enough for zstd and small enough to hold a few."""

PIECE: Final = 2 << 20
"""Bytes hashed at a time on the CPU: a piece is still in a cache when its changed blocks are copied, and large enough
that calls from Python do not show (1 MiB takes a tenth to a third longer, 4 MiB about as long)."""

HASH_NAME: Final = "xxh3-128"

FORMAT_VERSION: Final = 1
"""Of undo and redo files."""
RECORD_VERSION: Final = 2
"""Of commit records. 2: `deferred`, old files that wait to become undo data; who knows 1 would lose the history."""
RECORDS_READ: Final = (1, 2)
COMMIT_MAGIC: Final = b"HOGWCMIT"
UNDO_MAGIC: Final = b"HOGWUNDO"
REDO_MAGIC: Final = b"HOGWREDO"
FRAME_MAGIC: Final = 0x4D415246
"""'FRAM' in little-endian."""
END_OF_FRAMES: Final = 0xFFFFFFFF
"""Tensor number of the frame that ends an undo or redo file; a file without it was never finished."""

STORE_DIR: Final = ".hogwild"
"""Our folder in the checkpoint; a dot folder, so that loaders which glob *.safetensors pass it by."""
GENERATIONS_DIR: Final = "generations"
WRITER_LOCK: Final = "lock"
READERS_LOCK: Final = "readers.lock"
CLONING_MARK: Final = "cloning"
SOURCE_FILE: Final = "source.json"
SOURCE_VERSION: Final = 1

REPLACE_SHARE: Final = 0.5
"""Share of a file's bytes from which it is written anew and renamed: in place, each byte is written twice
(redo file, then the file itself), so beyond a half a new file is less to write."""

MAX_HEADER: Final = 100_000_000
"""Largest safetensors header that the safetensors library itself accepts, in bytes."""
