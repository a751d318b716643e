"""Requests for a sync, a rollback or a verification: small records that exactly one executor takes.

A request reaches the worker on two ways: as a message of its queue, and by the training loop that asks `pending()`
between steps (the worker runs one task at a time, so the message would wait behind the job). `start` decides who does
it, atomically; the other finds nothing left to do.

    pending ──start──► running ──finish──► succeeded | failed     (pending ──cancel──► failed)
       ▲                  │
       └── worker died ───┘   (all of them may be done again; after ATTEMPTS times it has failed)

A living worker does none of them twice: an end that Redis could not be told is told before it is asked anything else.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from hogwild.errors import Conflict, IdempotencyConflict, JobCancelled, NotFound, TooManyRequests
from hogwild.tasks.app import ROLLBACK, SYNC, VERIFY
from hogwild.tasks.connections import Client
from hogwild.tasks.jobs import error_json, load_json
from hogwild.tasks.keys import Keys
from hogwild.tasks.messages import MOST_URGENT, Messages

Kind = Literal["sync", "rollback", "verify"]
_TASKS = {"sync": SYNC, "rollback": ROLLBACK, "verify": VERIFY}
ATTEMPTS = 3
MOST_PENDING = 32  # without a worker they wait for one: what is asked for all the same must not pile up
RETENTION_S = 86_400  # finished operations can be polled for a day

_NOW = """
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
"""
# KEYS: prefix. ARGV: id, kind, params, queue key, message, most that may wait
_SUBMIT = _NOW + """
local key = KEYS[1] .. 'op:' .. ARGV[1]
local known = redis.call('HGET', key, 'params')
if known then return known == ARGV[3] and 'there' or 'conflict' end
if redis.call('ZCARD', KEYS[1] .. 'ops') >= tonumber(ARGV[6]) then return 'full' end
redis.call('HSET', key, 'id', ARGV[1], 'kind', ARGV[2], 'params', ARGV[3], 'state', 'pending', 'created_at', now,
  'attempts', 0, 'worker', '')
redis.call('ZADD', KEYS[1] .. 'ops', now, ARGV[1])
redis.call('LPUSH', ARGV[4], ARGV[5])
return 'new'
"""
# KEYS: prefix. ARGV: id, worker, call
_START = _NOW + """
local key = KEYS[1] .. 'op:' .. ARGV[1]
local f = redis.call('HMGET', key, 'state', 'call')
if f[1] == 'running' and f[2] == ARGV[3] then return redis.call('HGETALL', key) end
if f[1] ~= 'pending' then return nil end
redis.call('HSET', key, 'state', 'running', 'worker', ARGV[2], 'started_at', now, 'call', ARGV[3])
redis.call('HINCRBY', key, 'attempts', 1)
return redis.call('HGETALL', key)
"""
# KEYS: prefix. ARGV: id, state, result JSON, error JSON, retention, 1: only if nobody has started it
_FINISH = _NOW + """
local key = KEYS[1] .. 'op:' .. ARGV[1]
local state = redis.call('HGET', key, 'state')
if state ~= 'pending' and (state ~= 'running' or ARGV[6] == '1') then return 0 end  -- pending: thought to be nobody's
redis.call('HSET', key, 'state', ARGV[2], 'finished_at', now, 'result', ARGV[3], 'error', ARGV[4])
redis.call('EXPIRE', key, ARGV[5])
redis.call('ZREM', KEYS[1] .. 'ops', ARGV[1])
redis.call('HINCRBY', KEYS[1] .. 'counters', 'operations_' .. ARGV[2], 1)
return 1
"""
# KEYS: prefix. ARGV: id, most attempts, error JSON, retention, queue key, message, asking worker
_RETRY = _NOW + """
local key = KEYS[1] .. 'op:' .. ARGV[1]
local f = redis.call('HMGET', key, 'state', 'worker', 'attempts')
if f[1] ~= 'pending' and f[1] ~= 'running' then
  redis.call('ZREM', KEYS[1] .. 'ops', ARGV[1])
  return 0
end
if f[1] == 'running' then
  if f[2] ~= ARGV[7] and redis.call('EXISTS', KEYS[1] .. 'alive:' .. f[2]) == 1 then return 0 end
  if tonumber(f[3]) >= tonumber(ARGV[2]) then
    redis.call('HSET', key, 'state', 'failed', 'error', ARGV[3], 'finished_at', now)
    redis.call('EXPIRE', key, ARGV[4])
    redis.call('ZREM', KEYS[1] .. 'ops', ARGV[1])
    return 0
  end
  redis.call('HSET', key, 'state', 'pending', 'worker', '')
end
redis.call('LPUSH', ARGV[5], ARGV[6])
return 1
"""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A request for a sync, a rollback or a verification. Times in seconds since the epoch, by Redis' clock."""

    id: str
    kind: Kind
    params: dict[str, Any]
    state: str  # pending | running | succeeded | failed
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def final(self) -> bool:
        """Nothing will happen to it any more."""
        return self.state in ("succeeded", "failed")


class Operations:
    """Operations of one served model."""

    def __init__(self, client: Client, messages: Messages, model: str) -> None:
        self.client = client
        self.messages = messages
        self.keys = Keys(model)
        self._ended: dict[str, list[Any]] = {}  # what `finish` did not get to Redis yet: operation → the script's ARGV
        self._submit = client.register_script(_SUBMIT)
        self._start = client.register_script(_START)
        self._finish = client.register_script(_FINISH)
        self._retry = client.register_script(_RETRY)

    def submit(self, kind: Kind, *, op_id: str | None = None, **params: Any) -> str:
        """Durably ask for an operation; returns its id. It goes before all jobs in the queue.

        `op_id`: of `id_of`; asking again with it is the same operation. Raises IdempotencyConflict when that one has
        other `params`, TooManyRequests when MOST_PENDING operations wait.
        """
        op_id = op_id or f"op-{secrets.token_hex(12)}"
        message = self._message(op_id, kind, params)
        answer = self._submit(keys=[self.keys.prefix], args=[op_id, kind, json.dumps(params), message.key,
                                                             message.body, MOST_PENDING])
        if answer == b"conflict":
            raise IdempotencyConflict(operation=op_id)
        if answer == b"full":
            raise TooManyRequests(f"{MOST_PENDING} saves, rollbacks and verifications are waiting, which is the "
                                  "limit.", retry_after=5, limit=MOST_PENDING)
        return op_id

    @staticmethod
    def id_of(kind: Kind, idempotency_key: str) -> str:
        """The id of the operation of an idempotency key, which is already scoped to its owner."""
        return f"op-{hashlib.sha256(f'{kind}:{idempotency_key}'.encode()).hexdigest()[:24]}"

    def known(self, op_id: str) -> bool:
        """Whether this operation was asked for, and not forgotten since."""
        return bool(self.client.exists(self.keys("op", op_id)))

    def get(self, op_id: str) -> Operation:
        """One operation. Raises NotFound."""
        row = self.client.hgetall(self.keys("op", op_id))
        if not row:
            raise NotFound(f"There is no operation {op_id!r}; finished ones are forgotten after a day.")
        return _from_hash(row)

    def pending(self) -> Sequence[Operation]:
        """Operations that nobody has started, oldest first. Cheap: one command when there are none."""
        self._report()
        ids = self.client.zrange(self.keys("ops"), 0, -1)
        rows = (self.client.hgetall(self.keys("op", op_id.decode())) for op_id in ids)
        return [op for op in map(_from_hash, filter(None, rows)) if op.state == "pending"]

    def start(self, op: Operation | str, worker_id: str = "") -> Operation | None:
        """Take an operation; None when somebody else has or had it, or this worker has done it already."""
        self._report()
        op_id = op if isinstance(op, str) else op.id
        row = self._start(keys=[self.keys.prefix], args=[op_id, worker_id, secrets.token_hex(8)])
        return _from_hash(dict(zip(row[::2], row[1::2], strict=True))) if row else None

    def finish(self, op: Operation | str, result: Mapping[str, Any] | None = None,
               error: BaseException | None = None) -> None:
        """End a started operation, as failed when there is an `error`.

        If Redis can't be told, that is raised, and told again before the next operation is taken or published.
        """
        op_id = op if isinstance(op, str) else op.id
        self._ended[op_id] = [
            op_id, "failed" if error else "succeeded", json.dumps(dict(result or {}), default=str),
            error_json(error), RETENTION_S, 0]
        self._report()

    def cancel(self, op_id: str) -> Operation:
        """Take back an operation that nobody has started; again is no error. Raises NotFound, Conflict."""
        cancelled = JobCancelled("It was cancelled before a worker began it.")
        done = self._finish(keys=[self.keys.prefix],
                            args=[op_id, "failed", "{}", error_json(cancelled), RETENTION_S, 1])
        op = self.get(op_id)
        if not done and (op.error or {}).get("type") != cancelled.slug:
            raise Conflict(f"{op_id} can't be cancelled: it {'runs' if op.state == 'running' else f'has {op.state}'}.",
                           state=op.state)
        return op

    def _report(self) -> None:
        for op_id, args in list(self._ended.items()):
            self._finish(keys=[self.keys.prefix], args=args)
            self._ended.pop(op_id, None)  # a commit's thread may have been faster

    def reconcile(self, worker_id: str = "") -> int:
        """Publish unfinished operations again whose worker died; at boot and in the tick. Returns how many.

        `worker_id`: the caller, when it is the worker and does nothing else now.
        """
        self._report()
        gave_up = json.dumps({"type": "training", "message": f"The worker died {ATTEMPTS} times in this operation."})
        published = 0
        for raw in self.client.zrange(self.keys("ops"), 0, -1):
            op_id = raw.decode()
            row = self.client.hgetall(self.keys("op", op_id))
            if not row:
                self.client.zrem(self.keys("ops"), op_id)
                continue
            op = _from_hash(row)
            message = self._message(op.id, op.kind, op.params)
            published += self._retry(keys=[self.keys.prefix], args=[
                op_id, ATTEMPTS, gave_up, RETENTION_S, message.key, message.body, worker_id])
        return published

    def _message(self, op_id: str, kind: Kind, params: Mapping[str, Any]) -> Any:
        args = (op_id, params.get("generation")) if kind == "rollback" else (op_id,)
        return self.messages.build(_TASKS[kind], args, subject=op_id, priority=MOST_URGENT)


def _from_hash(row: Mapping[bytes, bytes]) -> Operation:
    h = {key.decode(): value.decode() for key, value in row.items()}
    return Operation(
        id=h["id"], kind=cast("Kind", h["kind"]), params=json.loads(h["params"]),
        state=h["state"], created_at=float(h["created_at"]),
        started_at=float(h["started_at"]) if h.get("started_at") else None,
        finished_at=float(h["finished_at"]) if h.get("finished_at") else None, attempts=int(h["attempts"]),
        result=load_json(h["result"]) if h.get("result") else None,
        error=load_json(h["error"]) if h.get("error") else None)
