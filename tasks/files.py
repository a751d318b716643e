"""Uploaded files of the OpenAI-compatible API, kept in Redis beside the jobs that come of them."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from hogwild.errors import NotFound, PayloadTooLarge
from hogwild.tasks.connections import Client
from hogwild.tasks.keys import Keys

PLACE_S = 86400  # who pages through the list and deletes may ask for what follows a deleted file
MAX_TOTAL_BYTES = 1 << 30  # Redis holds everything in memory; a forgotten upload must not crowd the jobs out

# KEYS: prefix. ARGV: id, file name, purpose, content, most bytes in all
_PUT = """
local P = KEYS[1]
if redis.call('EXISTS', P .. 'file:' .. ARGV[1]) == 1 then return 1 end
local total = tonumber(redis.call('GET', P .. 'files-bytes') or '0')
if total + #ARGV[4] > tonumber(ARGV[5]) then return 0 end
local t = redis.call('TIME')
local seq = redis.call('INCR', P .. 'files-seq')
redis.call('HSET', P .. 'file:' .. ARGV[1], 'id', ARGV[1], 'filename', ARGV[2], 'purpose', ARGV[3],
  'bytes', #ARGV[4], 'created_at', t[1], 'seq', seq)
redis.call('SET', P .. 'filedata:' .. ARGV[1], ARGV[4])
redis.call('ZADD', P .. 'files', seq, ARGV[1])
redis.call('INCRBY', P .. 'files-bytes', #ARGV[4])
return 1
"""
# KEYS: prefix. ARGV: id, seconds to remember its place in the list
_DELETE = """
local P = KEYS[1]
local size, seq = unpack(redis.call('HMGET', P .. 'file:' .. ARGV[1], 'bytes', 'seq'))
if not size then return 0 end
redis.call('SET', P .. 'file-place:' .. ARGV[1], seq, 'EX', ARGV[2])
redis.call('DEL', P .. 'file:' .. ARGV[1], P .. 'filedata:' .. ARGV[1])
redis.call('ZREM', P .. 'files', ARGV[1])
redis.call('DECRBY', P .. 'files-bytes', size)
return 1
"""


@dataclass(frozen=True)
class StoredFile:
    """What is known of an uploaded file, without its content."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int  # seconds since the epoch
    seq: int


class Files:
    """Uploaded files of one served model."""

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self.keys = Keys(model)
        self._put = client.register_script(_PUT)
        self._delete = client.register_script(_DELETE)

    def put(self, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Store a file durably. Raises PayloadTooLarge when all files together would pass MAX_TOTAL_BYTES."""
        file_id = f"file-{secrets.token_hex(12)}"
        if not self._put(keys=[self.keys.prefix], args=[file_id, filename, purpose, content, MAX_TOTAL_BYTES]):
            raise PayloadTooLarge(f"The uploaded files together would pass {MAX_TOTAL_BYTES} bytes: delete some "
                                  "(DELETE /v1/files/{id}); jobs no longer need them once they are created.",
                                  limit=MAX_TOTAL_BYTES)
        return self.get(file_id)

    def get(self, file_id: str) -> StoredFile:
        """One file. Raises NotFound."""
        row = self.client.hgetall(self.keys("file", file_id))
        if not row:
            raise NotFound(f"There is no file {file_id[:60]!r}.")
        return _from_hash(row)

    def place(self, file_id: str) -> int:
        """The `seq` of a file, or of one that was deleted within a day. Raises NotFound."""
        gone = self.client.get(self.keys("file-place", file_id))
        return self.get(file_id).seq if gone is None else int(gone)

    def content(self, file_id: str) -> bytes:
        """Its bytes. Raises NotFound."""
        content = self.client.get(self.keys("filedata", file_id))
        if content is None:
            raise NotFound(f"There is no file {file_id[:60]!r}.")
        return bytes(content)

    def delete(self, file_id: str) -> None:
        """Forget it; jobs made of it are not touched. Raises NotFound."""
        if not self._delete(keys=[self.keys.prefix], args=[file_id, PLACE_S]):
            raise NotFound(f"There is no file {file_id[:60]!r}.")

    def list(self, *, limit: int, after: int | None = None,
             ascending: bool = False) -> tuple[Sequence[StoredFile], bool]:
        """Files by age and whether more follow. `after`: `seq` of the last one of the page before."""
        bound = f"({after}" if after is not None else ("-inf" if ascending else "+inf")
        if ascending:
            ids = self.client.zrangebyscore(self.keys("files"), bound, "+inf", start=0, num=limit + 1)
        else:
            ids = self.client.zrevrangebyscore(self.keys("files"), bound, "-inf", start=0, num=limit + 1)
        rows = [self.client.hgetall(self.keys("file", file_id.decode())) for file_id in ids[:limit]]
        return [_from_hash(row) for row in rows if row], len(ids) > limit


def _from_hash(row: dict[bytes, bytes]) -> StoredFile:
    h = {key.decode(): value.decode() for key, value in row.items()}
    return StoredFile(h["id"], h["filename"], h["purpose"], int(h["bytes"]), int(h["created_at"]), int(h["seq"]))
