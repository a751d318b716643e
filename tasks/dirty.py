"""When is a checkpoint sync due? The state of the debounce, in Redis.

Training marks itself unsaved after each step (or a few); beat's tick asks every half minute whether training has been
quiet for `quiet_s`, or is unsaved for longer than `max_age_s`. Many jobs, one sync; and a sync that ends while training
goes on leaves the steps since its snapshot unsaved.
"""

from dataclasses import dataclass

from hogwild.tasks.connections import Client
from hogwild.tasks.keys import Keys

_NOW = """
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
"""
# KEYS: dirty. ARGV: weight version, steps
_MARK = _NOW + """
redis.call('HSETNX', KEYS[1], 'oldest_at', now)
redis.call('HSET', KEYS[1], 'last_at', now, 'weight_version', ARGV[1])
return redis.call('HINCRBY', KEYS[1], 'steps', ARGV[2])
"""
# KEYS: dirty, last sync. ARGV: generation, weight version
_CLEAR = _NOW + """
local f = redis.call('HMGET', KEYS[1], 'weight_version', 'last_at')
if f[1] and tonumber(f[1]) > tonumber(ARGV[2]) then
  -- steps came after the snapshot: they are unsaved since then at the latest
  redis.call('HSET', KEYS[1], 'oldest_at', now, 'steps', tonumber(f[1]) - tonumber(ARGV[2]))
  redis.call('HDEL', KEYS[1], 'requested')
else
  redis.call('DEL', KEYS[1])
end
redis.call('HSET', KEYS[2], 'generation', ARGV[1], 'weight_version', ARGV[2], 'at', now)
return 1
"""
# KEYS: dirty, last sync. ARGV: live weight version, head generation, its weight version
_SETTLE = _NOW + """
redis.call('HSET', KEYS[2], 'generation', ARGV[2], 'weight_version', ARGV[3])
redis.call('HSETNX', KEYS[2], 'at', now)
if ARGV[1] == ARGV[3] then return redis.call('DEL', KEYS[1]) end
if redis.call('HGET', KEYS[1], 'weight_version') ~= ARGV[1] then
  redis.call('HSET', KEYS[1], 'weight_version', ARGV[1], 'last_at', now)
end
redis.call('HSETNX', KEYS[1], 'oldest_at', now)
redis.call('HSET', KEYS[1], 'steps', math.max(1, tonumber(ARGV[1]) - tonumber(ARGV[3])))
return 1
"""


@dataclass(frozen=True)
class DirtyState:
    """Unsaved training. Times in seconds since the epoch, by Redis' clock; None: nothing is unsaved."""

    weight_version: int | None
    steps: int
    oldest_at: float | None
    last_at: float | None
    requested: bool
    now: float
    generation: int | None  # last sync
    synced_version: int | None
    synced_at: float | None

    @property
    def dirty(self) -> bool:
        """There are steps that no generation holds."""
        return self.oldest_at is not None


class Dirty:
    """Debounce of one served model's syncs."""

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self.keys = Keys(model)
        self._mark = client.register_script(_MARK)
        self._clear = client.register_script(_CLEAR)
        self._settle = client.register_script(_SETTLE)

    def mark_dirty(self, weight_version: int, n_steps: int = 1) -> None:
        """`n_steps` more steps are in the weights, which now have `weight_version`."""
        self._mark(keys=[self.keys("dirty")], args=[weight_version, n_steps])

    def request_sync(self) -> None:
        """Make a sync due at once, whether or not something is unsaved."""
        self.client.hset(self.keys("dirty"), "requested", "1")

    def clear(self, generation: int, up_to_weight_version: int) -> None:
        """A sync of the weights at that version was committed. Steps applied since its snapshot stay unsaved."""
        self._clear(keys=[self.keys("dirty"), self.keys("last-sync")], args=[generation, up_to_weight_version])

    def settle(self, weight_version: int, generation: int, synced_version: int) -> None:
        """On attaching, and between jobs: what is unsaved follows from the live weights and the last generation.

        Redis may have lost its data, a worker may have died between a step and its mark, and steps that were marked
        may be gone with the weights that had them. Waiting times that are known go on.
        """
        keys = [self.keys("dirty"), self.keys("last-sync")]
        self._settle(keys=keys, args=[weight_version, generation, synced_version])

    def state(self) -> DirtyState:
        """Everything, read at one moment."""
        pipe = self.client.pipeline(transaction=True)
        pipe.hgetall(self.keys("dirty"))
        pipe.hgetall(self.keys("last-sync"))
        pipe.time()
        dirty, last, (seconds, micros) = pipe.execute()
        return DirtyState(
            weight_version=int(dirty[b"weight_version"]) if b"weight_version" in dirty else None,
            steps=int(dirty.get(b"steps", 0)),
            oldest_at=float(dirty[b"oldest_at"]) if b"oldest_at" in dirty else None,
            last_at=float(dirty[b"last_at"]) if b"last_at" in dirty else None,
            requested=b"requested" in dirty, now=seconds + micros / 1e6,
            generation=int(last[b"generation"]) if last else None,
            synced_version=int(last[b"weight_version"]) if last else None,
            synced_at=float(last[b"at"]) if last else None)

    def due(self, quiet_s: float, max_age_s: float, now: float | None = None) -> bool:
        """Whether a sync should start. `now`: seconds since the epoch; default: Redis' clock.

        A clock that jumped back makes the stamps lie in the future: then the waiting time is unknown and a sync is due,
        which costs one sync; the other choice would be none for as long as the jump.
        """
        state = self.state()
        if state.requested:
            return True
        if state.oldest_at is None or state.last_at is None:
            return False
        at = state.now if now is None else now
        if at < state.last_at:
            return True
        return at - state.last_at >= quiet_s or at - state.oldest_at >= max_age_s
