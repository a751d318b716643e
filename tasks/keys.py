"""Names of everything that Hogwild keeps in Redis.

All keys of one served model begin with `hogwild:{<model>}:`; several models share a Redis (and the braces would keep
them on one node of a cluster). Celery's own keys (queue lists, `unacked`, results) lie beside them in the same
database, because one script must be able to write a job and its message together.

| key                | type   | what                                                                       |
|--------------------|--------|----------------------------------------------------------------------------|
| `job:<id>`         | hash   | the job: state, counters, fence, configuration                             |
| `losses:<id>`      | list   | loss of each applied step                                                  |
| `events:<id>`      | stream | what happened, for server-sent events                                      |
| `jobs`             | zset   | every job id by sequence number: listing                                   |
| `state:<state>`    | zset   | the same, by state: filters and counts                                     |
| `kind:<kind>`      | zset   | the same, by the route they came from: `train`, `fine_tuning`              |
| `retention`        | zset   | finished jobs by the time they may be forgotten                            |
| `payload:<sha256>` | string | packed token ids, shared by jobs with the same samples, until they ended   |
| `payload-refs`     | hash   | sha256 → number of jobs; `payload-bytes`: string, bytes of all payloads    |
| `idem:<sha256>`    | hash   | Idempotency-Key → body hash, job id; expires                               |
| `counters`         | hash   | totals for /metrics                                                        |
| `dirty`            | hash   | unsaved training: since when, up to which weight version                   |
| `op:<id>`, `ops`   | hash, zset | requests for a sync, a rollback or a verification                      |
| `model`            | string | JSON: what the served model is (vocabulary, lengths)                       |
| `worker`           | string | JSON: state of the worker; `alive:<worker id>` expires when it falls silent |
"""

from dataclasses import dataclass

JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
FINAL_STATES = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Keys:
    """Key names of one served model."""

    model: str

    @property
    def prefix(self) -> str:
        """What every key of this model begins with; also the one key name that scripts get."""
        return f"hogwild:{{{self.model}}}:"

    def __call__(self, *parts: str) -> str:
        """`keys("job", job_id)` → `hogwild:{model}:job:<id>`."""
        return self.prefix + ":".join(parts)
