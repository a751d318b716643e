"""What `hogwild doctor` says of the Redis it is pointed at."""

from collections.abc import Callable
from typing import Any

from hogwild.cli.doctor import queue
from hogwild.config import Settings


def verdicts(url: str | None) -> dict[str, tuple[str, str]]:
    return {f.check: (f.verdict, f.message) for f in queue(Settings(redis_url=url))}


def test_the_embedded_server_and_one_configured_like_it_are_fine(redis_server: str) -> None:
    assert {verdict for verdict, _ in verdicts(None).values()} == {"ok"}
    assert {verdict for verdict, _ in verdicts(redis_server).values()} == {"ok"}


def test_a_redis_that_can_lose_jobs_is_a_problem_with_its_remedy(own_redis: Callable[..., Any]) -> None:
    server = own_redis(options=("--appendonly", "no"))
    verdict, message = verdicts(server.url)["appendonly"]
    assert verdict == "problem"
    assert "appendonly yes" in message


def test_a_redis_that_does_not_answer_is_a_problem(free_tcp_port: Callable[[], int]) -> None:
    verdict, message = verdicts(f"redis://127.0.0.1:{free_tcp_port()}/0")["Redis"]
    assert verdict == "problem"
    assert "HOGWILD_REDIS_URL" in message
