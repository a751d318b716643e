"""Can this Redis lose accepted jobs? What `hogwild doctor` and /readyz ask of a Redis that is not ours."""

from dataclasses import dataclass
from typing import Literal

import redis

from hogwild.tasks.connections import Client


@dataclass(frozen=True)
class Finding:
    """One answer about the server's configuration."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str


def check(client: Client) -> list[Finding]:
    """Findings about persistence, eviction and health. Raises redis.RedisError when the server can't be reached."""
    try:
        config = {k: v for name in ("appendonly", "appendfsync", "maxmemory-policy", "maxmemory")
                  for k, v in client.config_get(name).items()}
    except redis.ResponseError:
        return [Finding("warning", "config", "Redis does not let us read its configuration (CONFIG GET): make sure "
                        "yourself of appendonly yes, appendfsync always and maxmemory-policy noeviction.")]
    value = {_text(k): _text(v) for k, v in config.items()}
    found = []
    if value["appendonly"] != "yes":
        found.append(Finding("error", "appendonly", "appendonly is off: accepted jobs are lost when Redis restarts. "
                             "Set 'appendonly yes'."))
    elif value["appendfsync"] != "always":
        found.append(Finding("warning", "appendfsync", f"appendfsync is {value['appendfsync']}: a power cut can lose "
                             "accepted jobs and the record of begun steps. Set 'appendfsync always'."))
    else:
        found.append(Finding("ok", "persistence", "every write is on disk before it is answered (appendfsync always)"))
    if value["maxmemory-policy"] != "noeviction":
        level: Literal["ok", "error"] = "ok" if value["maxmemory"] == "0" else "error"
        found.append(Finding(level, "maxmemory-policy", f"maxmemory-policy is {value['maxmemory-policy']}: Redis may "
                             "throw jobs away when memory is short. Set 'maxmemory-policy noeviction'."))
    else:
        found.append(Finding("ok", "eviction", "nothing is evicted (maxmemory-policy noeviction)"))
    persistence = client.info("persistence")
    if persistence.get("aof_last_write_status", "ok") != "ok":
        found.append(Finding("error", "aof", "the last write to the append-only file failed: is the disk full?"))
    return found


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
