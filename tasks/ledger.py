"""The ledger of jobs in Redis: the truth about what was accepted, what runs and what was done.

                     cancel                      cancel (at a step boundary)
              ┌───────────────────┐        ┌──────────────────┐
              │                   ▼        ▼                  │
    submit ─► queued ──claim──► running ──finish──► succeeded │ failed │ cancelled
              ▲    ▲              │  │
              │    └────park──────┘  └─ worker died ─► claim by the next worker, at the first step not begun
              └─ resume (message published again)

At most once per step: `begin_step(k)` is durable before the first weight is written and `applied(k)` after the last.
A claim raises the job's fence, and every later call carries it: a worker that was taken over gets `Conflict` and can't
write another word. A step that was begun and not applied counts as *interrupted* and is never begun again; whether it
reached the weights is asked of the weights themselves (`weights_version`), not guessed.

Redis answers a write only when it is on disk (`appendfsync always`), so what these calls return is durable.
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hogwild.config import Settings
from hogwild.errors import Conflict, IdempotencyConflict, InvalidRequest, NotFound, TooManyRequests
from hogwild.tasks import scripts
from hogwild.tasks.announce import Announcer
from hogwild.tasks.app import TRAIN, make_app
from hogwild.tasks.connections import Client
from hogwild.tasks.jobs import Job, error_json
from hogwild.tasks.keys import FINAL_STATES, JOB_STATES, Keys
from hogwild.tasks.messages import Message, Messages
from hogwild.tasks.payloads import Payload, Sample, load

DEFAULT_PRIORITY = 5
IDEMPOTENCY_S = 86_400  # long enough for any client's retries, short enough not to fill Redis
# A job whose worker dies again and again without one applied step is the cause of the deaths: give up on it.
BARREN_ATTEMPTS = 5
RECONCILE_GRACE_S = 60.0  # a message may be on its way between Redis and the worker
LIST_SCAN = 1000  # rows read for one page when a metadata filter drops most of them

_POISON = json.dumps({"type": "training", "message":
                      f"The worker died {BARREN_ATTEMPTS} times at this job without finishing a step. Look into the "
                      "worker's log; a smaller max_tokens_per_step may help if it ran out of memory."})


@dataclass(frozen=True)
class Lease:
    """The right to run a job, until another worker claims it."""

    job_id: str
    worker_id: str
    fence: int
    first_step: int  # 0-based: the first step that was never begun
    attempts: int
    steps: int | None
    payload: str
    pack_tokens: int | None = None  # of the plan by which the job began
    seconds: float = 0.0  # that its applied steps took
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A page of jobs, newest first, and the cursor of the next one (None: that was all)."""

    jobs: list[Job]
    next_cursor: int | None


@dataclass(frozen=True)
class Reconciled:
    """What `reconcile` did."""

    republished: tuple[str, ...]
    purged: int


class Ledger:
    """Job ledger of one served model. Thread-safe, as its client is."""

    def __init__(self, client: Client, settings: Settings, messages: Messages | None = None,
                 announcer: Announcer | None = None) -> None:
        self.client = client
        self.settings = settings
        self.keys = Keys(settings.model_name)
        self.messages = messages or Messages(make_app(settings), settings.queue)
        self.announcer = announcer
        self._scripts = {name: client.register_script(getattr(scripts, name))
                         for name in ("SUBMIT", "SETTLE", "CLAIM", "PLANNED", "BEGIN_STEP", "APPLIED", "FINISH",
                                      "PARK", "RELEASE", "REQUEST", "REPUBLISH", "PURGE")}

    def _call(self, script: str, *args: Any) -> Any:
        return self._scripts[script](keys=[self.keys.prefix], args=args)

    # --- the API's side ---------------------------------------------------------------------------------------------

    def submit(self, payload: Payload, config: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None,
               priority: int = DEFAULT_PRIORITY, idempotency_key: str | None = None, api_key: str = "",
               kind: Literal["train", "fine_tuning"] = "train",
               extra: Mapping[str, Any] | None = None) -> tuple[str, bool]:
        """Accept a job: ledger row, samples and message in one durable write. Returns (job id, True if new).

        `idempotency_key`: already scoped to its owner. Raises IdempotencyConflict when it came with another body,
        TooManyRequests when `queue_limit` jobs wait, or `queue_bytes` of samples.
        """
        job_id = f"{'ftjob' if kind == 'fine_tuning' else 'job'}-{secrets.token_hex(12)}"
        message = self.messages.build(TRAIN, (job_id,), subject=job_id, priority=priority)
        config_json = json.dumps(dict(config), sort_keys=True)
        metadata_json = json.dumps(dict(metadata or {}), sort_keys=True)
        idem = body = ""
        if idempotency_key is not None:
            idem = _digest(idempotency_key)
            body = _digest(payload.digest, config_json, metadata_json, str(priority), kind)
        answer, detail = self._call(
            "SUBMIT", job_id, message.key, message.id, message.body, payload.digest, payload.data, config_json,
            metadata_json, priority, payload.samples, payload.tokens, idem, body, IDEMPOTENCY_S,
            self.settings.queue_limit, api_key, kind, json.dumps(dict(extra)) if extra else "",
            self.settings.queue_bytes)
        if answer == b"idempotency":
            raise IdempotencyConflict(job_id=detail.decode())
        if answer == b"full":
            raise TooManyRequests(f"{detail.decode()} jobs are waiting, which is the limit.",
                                  retry_after=30, limit=self.settings.queue_limit)
        if answer == b"full-of-samples":
            raise TooManyRequests(f"The jobs that wait hold {detail.decode()} bytes of samples; with this one's "
                                  f"{len(payload.data)} it would be more than the limit (HOGWILD_QUEUE_BYTES).",
                                  retry_after=30, limit=self.settings.queue_bytes)
        new = answer == b"created"
        if new:
            self._announce(message)
        return detail.decode(), new

    def get(self, job_id: str) -> Job:
        """One job. Raises NotFound."""
        return self._parse(job_id, self.client.hgetall(self.keys("job", job_id)))

    def get_with_losses(self, job_id: str, last: int = 1000) -> tuple[Job, Sequence[float | None]]:
        """One job and what `losses` returns, in one round trip. Raises NotFound."""
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(self.keys("job", job_id))
        pipe.lrange(self.keys("losses", job_id), -last, -1)
        row, values = pipe.execute()
        return self._parse(job_id, row), _losses(values)

    def losses(self, job_id: str, last: int = 1000) -> Sequence[float | None]:
        """Losses of the job's most recent applied steps, oldest first; None where one was not finite."""
        return _losses(self.client.lrange(self.keys("losses", job_id), -last, -1))

    def list(self, *, limit: int = 20, cursor: int | None = None, state: str | None = None,
             metadata: Mapping[str, str] | None = None, kind: str | None = None) -> Page:
        """Jobs, newest first. `cursor`: the `next_cursor` of the page before.

        With a `metadata` filter, or with `state` and `kind`, a page can be short although more follow: at most
        LIST_SCAN rows are read.
        """
        if state is not None and state not in JOB_STATES:
            raise InvalidRequest(f"state must be one of {', '.join(JOB_STATES)}")
        index = self.keys("state", state) if state else self.keys("kind", kind) if kind else self.keys("jobs")
        found: list[Job] = []
        wanted = metadata or {}
        scanned = 0
        while True:
            upper = f"({cursor}" if cursor is not None else "+inf"
            ids = self.client.zrevrangebyscore(index, upper, "-inf", start=0, num=limit + 1, withscores=True)
            rows = self._rows([job_id.decode() for job_id, _ in ids[:limit]])
            for (_, seq), row in zip(ids, rows, strict=False):
                cursor = int(seq)
                scanned += 1
                if not row:
                    continue
                job = Job.from_hash(row)
                if wanted.items() <= job.metadata.items() and kind in (None, job.kind):
                    found.append(job)
                    if len(found) == limit:
                        break
            else:
                if len(ids) <= limit:
                    return Page(found, None)
            if len(found) == limit or scanned >= LIST_SCAN:
                more = self.client.zcount(index, "-inf", f"({cursor}")
                return Page(found, cursor if more else None)

    def counts(self) -> dict[str, int]:
        """Number of jobs in each state."""
        pipe = self.client.pipeline(transaction=False)
        for state in JOB_STATES:
            pipe.zcard(self.keys("state", state))
        return dict(zip(JOB_STATES, pipe.execute(), strict=True))

    def request(self, job_id: str, want: Literal["cancel", "pause", "run"]) -> Job:
        """Ask for a job to be cancelled, paused or resumed. Idempotent. Raises NotFound, Conflict.

        A queued job obeys at once, a running one at its next step boundary.
        """
        message = Message("", "", "")
        if want == "run":
            message = self._message(job_id)
        answer = self._call("REQUEST", job_id, want, message.key, message.id, message.body).decode()
        if answer == "published":
            self._announce(message)
        if answer == "missing":
            self.get(job_id)
        if answer.startswith("final:"):
            raise Conflict(f"The job has already {answer[6:]}." if answer[6:] != "cancelled"
                           else "The job was cancelled.", state=answer[6:])
        if answer == "cancelling":
            raise Conflict("The job is being cancelled.", state="running")
        return self.get(job_id)

    # --- the worker's side ------------------------------------------------------------------------------------------

    def settle(self, worker_id: str, weights_version: int) -> None:
        """Judge the steps that dead workers left open, before anything else moves the version of the live weights."""
        self._call("SETTLE", worker_id, weights_version)

    def claim(self, job_id: str, worker_id: str, *, weights_version: int | None = None) -> Lease | None:
        """Take a job to run it, or None: it is finished, paused, or another living worker has it.

        `weights_version`: version of the live weights. When the last worker died between writing a step and
        recording it, this tells that the step was applied.
        """
        row = self._call("CLAIM", job_id, worker_id, secrets.token_hex(8),
                         "" if weights_version is None else weights_version, BARREN_ATTEMPTS, _POISON)
        if not row:
            return None
        h = dict(zip(row[::2], row[1::2], strict=True))
        return Lease(job_id, worker_id, fence=int(h[b"fence"]), first_step=int(h[b"begun"]),
                     attempts=int(h[b"attempts"]), steps=int(h[b"steps"]) if h.get(b"steps") else None,
                     pack_tokens=int(h[b"pack_tokens"]) if h.get(b"pack_tokens") else None,
                     seconds=float(h.get(b"seconds", 0.0)), payload=h[b"payload"].decode(),
                     config=json.loads(h[b"config"]))

    def samples(self, lease: Lease) -> Sequence[Sample]:
        """The samples of a claimed job. Raises NotFound, HogwildError (damaged)."""
        return load(self.client, self.keys, lease.payload)

    def planned(self, lease: Lease, steps: int, pack_tokens: int | None = None,
                account: Mapping[str, Any] | None = None) -> None:
        """Record how many steps the job will take, and the size of their packs. Raises Conflict (lease lost).

        `account`: what the plan says about memory, as it is shown; JSON.
        """
        size = "" if pack_tokens is None else pack_tokens
        shown = "" if account is None else json.dumps(dict(account))
        self._held(self._call("PLANNED", lease.job_id, lease.fence, steps, size, shown), lease)

    def begin_step(self, lease: Lease, step: int, *, weight_version: int | None = None) -> None:
        """Durably record that step `step` (0-based) begins; return only then. Raises Conflict (lease lost).

        `weight_version`: version before the step; see `claim`.
        """
        self._held(self._call("BEGIN_STEP", lease.job_id, lease.fence, step, secrets.token_hex(8),
                              "" if weight_version is None else weight_version), lease, step)

    def applied(self, lease: Lease, step: int, weight_version: int, *, loss: float = math.nan, tokens: int = 0,
                seconds: float = 0.0, grad_norm: float | None = None, replay_divergence: float | None = None,
                total_steps: int | None = None, dropped: bool = False) -> None:
        """Record that step `step` has ended and the weights have `weight_version`. Raises Conflict (lease lost).

        `dropped`: its gradients were not finite, and nothing of it is in the weights.
        """
        data = {"step": step, "weight_version": weight_version, "loss": _finite(loss), "tokens": tokens,
                "seconds": round(seconds, 6), "grad_norm": _finite(grad_norm),
                "replay_divergence": _finite(replay_divergence), "steps": total_steps}
        self._held(self._call("APPLIED", lease.job_id, lease.fence, step, weight_version, f"{loss:.6g}", tokens,
                              f"{seconds:.6f}", "" if total_steps is None else total_steps, json.dumps(data),
                              0 if dropped else 1),
                   lease, step)

    def finish(self, lease: Lease, state: str, error: BaseException | Mapping[str, Any] | None = None) -> None:
        """End the job as succeeded, failed or cancelled. Raises Conflict (lease lost)."""
        if state not in FINAL_STATES:
            raise ValueError(f"a job ends as one of {FINAL_STATES}, not {state!r}")
        self._held(self._call("FINISH", lease.job_id, lease.fence, state, error_json(error)), lease)

    def requested(self, job_id: str) -> Literal["run", "pause", "cancel"]:
        """What the user wants of a running job; asked between steps. A job that is gone counts as cancelled."""
        value = self.client.hget(self.keys("job", job_id), "requested")
        if value == b"pause":
            return "pause"
        return "run" if value == b"run" else "cancel"

    def park(self, lease: Lease) -> bool:
        """Give a job that is to pause back between two steps, so that the worker is free for others.

        Resuming publishes it again and the next claim goes on where this one ended. False: it is to run after all.
        """
        answer = self._call("PARK", lease.job_id, lease.fence)
        if answer == b"go-on":
            return False
        self._held(answer, lease)
        return True

    def release(self, lease: Lease) -> None:
        """Put the job back between two steps, because this worker stops: the next one takes it up. Raises Conflict.

        One that is to pause waits for its resumption, and one that is to be cancelled ends here.
        """
        self._held(self._call("RELEASE", lease.job_id, lease.fence), lease)

    # --- the reconciler ---------------------------------------------------------------------------------------------

    def reconcile(self, worker_id: str = "", *, grace_s: float = RECONCILE_GRACE_S) -> Reconciled:
        """Publish again every job that should move and has no message a worker will get; forget expired jobs.

        Messages get lost: kombu takes one out of the list before it notes it as unacknowledged, and one that a dead
        worker held returns only after the visibility timeout. A message too many is harmless (claim refuses it), so
        doubt ends in publishing. `worker_id`: the caller, when it is the worker itself and runs no job now (at boot
        with `grace_s=0`, and in the tick); jobs that it seems to run are orphans of its last life.
        """
        open_jobs = self._open_jobs()
        republished = []
        if open_jobs:
            ready = self._ready_messages()
            for job_id, message_id in open_jobs:
                if message_id in ready:
                    continue
                message = self._message(job_id)
                if self._call("REPUBLISH", job_id, message_id, worker_id, grace_s, message.key, message.id,
                              message.body):
                    self._announce(message)
                    republished.append(job_id)
        return Reconciled(tuple(republished), self.purge())

    def purge(self, batch: int = 1000) -> int:
        """Forget finished jobs whose retention has ended, with samples that no other job uses. Returns how many."""
        purged = 0
        while n := self._call("PURGE", self.settings.job_retention_s, batch):
            purged += n
        return purged

    def _open_jobs(self) -> Sequence[tuple[str, str]]:
        """(job id, message id) of all running and queued jobs, running ones and older ones first."""
        found: list[tuple[str, str]] = []
        for state in ("running", "queued"):
            ids = self.client.zrange(self.keys("state", state), 0, -1)
            for start in range(0, len(ids), 1000):
                pipe = self.client.pipeline(transaction=False)
                chunk = ids[start:start + 1000]
                for job_id in chunk:
                    pipe.hget(self.keys("job", job_id.decode()), "message")
                found += [(job_id.decode(), message.decode())
                          for job_id, message in zip(chunk, pipe.execute(), strict=True) if message]
        return found

    def _ready_messages(self) -> set[str]:
        """Ids of the messages that wait in the queue's lists."""
        found = set()
        for key in self.messages.queue_keys():
            start = 0
            while chunk := self.client.lrange(key, start, start + 999):
                start += len(chunk)
                for raw in chunk:
                    found.add(json.loads(raw)["headers"]["id"])
        return found

    def _message(self, job_id: str) -> Message:
        priority = self.client.hget(self.keys("job", job_id), "priority")
        return self.messages.build(TRAIN, (job_id,), subject=job_id,
                                   priority=DEFAULT_PRIORITY if priority is None else int(priority))

    def _parse(self, job_id: str, row: dict[bytes, bytes]) -> Job:
        if not row:
            raise NotFound(f"There is no job {job_id!r}; finished jobs are forgotten after "
                           f"{self.settings.job_retention_s / 86400:g} days.")
        return Job.from_hash(row)

    def _announce(self, message: Message) -> None:
        if self.announcer is not None:
            self.announcer.announce(TRAIN, message)

    def _rows(self, ids: Iterable[str]) -> Sequence[dict[bytes, bytes]]:
        pipe = self.client.pipeline(transaction=False)
        for job_id in ids:
            pipe.hgetall(self.keys("job", job_id))
        rows: Sequence[dict[bytes, bytes]] = pipe.execute()
        return rows

    @staticmethod
    def _held(answer: bytes, lease: Lease, step: int | None = None) -> None:
        text = answer.decode()
        if text == "ok":
            return
        if text == "stale":
            raise Conflict(f"This worker's lease on {lease.job_id} was lost (fence {lease.fence}): another worker "
                           "took the job over, or it has ended.")
        what, _, detail = text.partition(":")
        if what == "open":
            raise Conflict(f"Step {detail} of {lease.job_id} has begun and not ended; step {step} can't begin.")
        raise Conflict(f"Step {step} of {lease.job_id} is out of order: {detail} steps have begun.")


def now(client: Client) -> float:
    """Redis' clock, in seconds since the epoch: the one clock of jobs, events and the debounce."""
    seconds, micros = client.time()
    return float(seconds) + float(micros) / 1e6


def wait_for(ledger: Ledger, job_id: str, timeout_s: float, poll_s: float = 0.1) -> Job:
    """Poll until the job has ended; raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (job := ledger.get(job_id)).final:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} is {job.state} after {timeout_s:g} s")
        time.sleep(poll_s)
    return job


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _losses(values: Iterable[bytes]) -> Sequence[float | None]:
    return [_finite(float(value)) for value in values]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
