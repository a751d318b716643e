"""A job as the ledger knows it: what the API shows and what `list` returns."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the ledger. Times are seconds since the epoch by Redis' clock."""

    id: str
    seq: int
    state: str  # queued | running | succeeded | failed | cancelled
    kind: str  # "train" or "fine_tuning": which API made it
    created_at: float
    queued_at: float
    started_at: float | None
    finished_at: float | None
    priority: int  # 0 … 9, 9 first
    samples: int
    tokens: int  # in the samples: one pass
    steps: int | None  # of the plan; None until a worker planned the job
    plan: dict[str, Any] | None  # the size of its packs and the memory it takes (`Plan.account` of the engine)
    steps_begun: int
    steps_applied: int
    steps_interrupted: int  # begun, not applied: a worker died in them; never repeated
    tokens_trained: int
    seconds: float  # spent in applied steps
    loss_first: float | None
    loss_last: float | None
    weight_version_first: int | None  # of the first and the last step this job applied
    weight_version_last: int | None
    attempts: int
    paused: bool
    requested: str  # run | pause | cancel
    worker: str
    error: dict[str, Any] | None
    payload: str
    api_key: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # what the API that made it wants to remember

    @property
    def final(self) -> bool:
        """Nothing will happen to it any more."""
        return self.state in ("succeeded", "failed", "cancelled")

    @classmethod
    def from_hash(cls, row: dict[bytes, bytes]) -> "Job":
        """From the bytes of HGETALL."""
        h = {key.decode(): value.decode() for key, value in row.items()}
        return cls(
            id=h["id"], seq=int(h["seq"]), state=h["state"], kind=h["kind"], created_at=float(h["created_at"]),
            queued_at=float(h["queued_at"]), started_at=_float(h, "started_at"), finished_at=_float(h, "finished_at"),
            priority=int(h["priority"]), samples=int(h["samples"]), tokens=int(h["tokens"]), steps=_int(h, "steps"),
            plan=json.loads(h["plan"]) if h.get("plan") else None,
            steps_begun=int(h["begun"]), steps_applied=int(h["applied"]), steps_interrupted=int(h["interrupted"]),
            tokens_trained=int(h.get("tokens_trained", 0)), seconds=float(h.get("seconds", 0)),
            loss_first=_float(h, "loss_first"), loss_last=_float(h, "loss_last"),
            weight_version_first=_int(h, "weight_version_first"), weight_version_last=_int(h, "weight_version_last"),
            attempts=int(h["attempts"]), paused=h["paused"] == "1", requested=h["requested"],
            worker=h.get("worker", ""), error=load_json(h["error"]) if h.get("error") else None,
            payload=h["payload"], api_key=h["api_key"], config=json.loads(h["config"]),
            metadata=json.loads(h["metadata"]), extra=json.loads(h["extra"]) if h.get("extra") else {})


def load_json(text: str | bytes) -> Any:
    """JSON of a worker's report: a NaN (of a loss, say), which is no JSON for anybody else, becomes None."""
    return json.loads(text, parse_constant=lambda _: None)


def _float(h: dict[str, str], name: str) -> float | None:
    return float(h[name]) if h.get(name) else None


def _int(h: dict[str, str], name: str) -> int | None:
    return int(h[name]) if h.get(name) else None


def error_json(error: BaseException | Mapping[str, Any] | None) -> str:
    """An error as the ledger keeps it: `{"type", "message", …}`; the empty string for none."""
    if error is None:
        return ""
    if isinstance(error, Mapping):
        return json.dumps(dict(error))
    slug = getattr(error, "slug", "internal")
    message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    return json.dumps({"type": slug, "message": message, **getattr(error, "details", {})}, default=str)
