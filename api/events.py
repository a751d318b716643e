"""Events of a job from its Redis stream, for server-sent events."""

from collections.abc import AsyncIterator

from hogwild.tasks.connections import AsyncClient
from hogwild.tasks.keys import FINAL_STATES, Keys

BLOCK_MS = 10_000  # one blocking read; a job that was forgotten meanwhile is noticed after it
BATCH = 500


async def follow(client: AsyncClient, keys: Keys, job_id: str, after: str) -> AsyncIterator[tuple[str, str, str]]:
    """(event id, kind, JSON) of each event after `after`, waiting for new ones until the job has ended."""
    key = keys("events", job_id)
    while True:
        answer = await client.xread({key: after}, count=BATCH, block=BLOCK_MS)
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer or []]
        entries = [entry for entries in streams for entry in _flat(entries)]
        for event_id, fields in entries:
            after = event_id.decode()
            kind = fields[b"event"].decode()
            yield after, kind, fields[b"data"].decode()
            if kind in FINAL_STATES:
                return
        if not entries:
            state = await client.hget(keys("job", job_id), "state")
            if state is None or state.decode() in FINAL_STATES:
                return  # the client had seen the last event, or the job's retention ended


def _flat(entries: list[object]) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """RESP3 wraps the entries of a stream in one more list than RESP2."""
    if entries and isinstance(entries[0], list):
        return [entry for part in entries for entry in part]  # type: ignore[attr-defined]
    return entries  # type: ignore[return-value]
