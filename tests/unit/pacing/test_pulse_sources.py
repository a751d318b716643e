"""Where readings come from: the shared file, vLLM's metrics, and the change from one to the other."""

import logging
import threading
import time

import pytest

from hogwild.gpu_worker.pulse import STALE_S, MetricsPulse, Pulse, StatePulse, parse_metrics
from hogwild.pulse_state import PulseWriter

# As vLLM 0.32 writes them, cut to what is read and one neighbour of each.
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="m"} 90.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="m"} 100.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 100.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 0.8
vllm:inter_token_latency_seconds_count{engine="1",model_name="m"} 50.0
vllm:inter_token_latency_seconds_sum{engine="1",model_name="m"} 4.5e-01
vllm:request_time_per_output_token_seconds_sum{engine="0",model_name="m"} 77.0
"""


def test_metrics_of_all_engines_are_added_up():
    reading = parse_metrics(METRICS, at=5.0)

    assert (reading.at, reading.running, reading.waiting, reading.tokens) == (5.0, 5, 1, 150)
    assert reading.itl_sum_s == pytest.approx(1.25)
    assert reading.busy and reading.source == "metrics" and reading.updated is None


def test_the_older_name_of_the_histogram():
    reading = parse_metrics(METRICS.replace("inter_token_latency", "time_per_output_token"), at=0.0)

    assert reading.tokens == 150


def test_both_names_are_not_counted_twice():
    older = "\n".join(line.replace("inter_token_latency", "time_per_output_token")
                      for line in METRICS.splitlines() if "inter_token" in line)

    assert parse_metrics(METRICS + older + "\n", at=0.0).tokens == 150


def test_no_token_yet():
    reading = parse_metrics("vllm:num_requests_running 0.0\n", at=0.0)

    assert (reading.tokens, reading.waiting, reading.busy) == (0, 0, False)


@pytest.mark.parametrize("text", ["", "<html>login</html>", "python_gc_objects_collected_total 1.0\n"])
def test_metrics_of_something_else_are_refused(text):
    with pytest.raises(ValueError, match="is this a vLLM"):
        parse_metrics(text, at=0.0)


def test_the_parser_reads_what_prometheus_client_writes():
    from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

    registry = CollectorRegistry()
    labels = {"model_name": "a b/c", "engine": "0"}
    Gauge("vllm:num_requests_running", "…", list(labels), registry=registry).labels(**labels).set(7)
    Gauge("vllm:num_requests_waiting", "…", list(labels), registry=registry).labels(**labels).set(2)
    latency = Histogram("vllm:inter_token_latency_seconds", "…", list(labels), registry=registry).labels(**labels)
    for value in (0.010, 0.00002):
        latency.observe(value)

    reading = parse_metrics(generate_latest(registry).decode(), at=0.0)

    assert (reading.running, reading.waiting, reading.tokens) == (7, 2, 2)
    assert reading.itl_sum_s == pytest.approx(0.01002)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_polling_is_off_the_calling_thread_and_survives_a_dead_server(caplog):
    answers: list[str | Exception] = [ConnectionError("refused"), ConnectionError("refused"), METRICS]
    threads = set()

    def fetch() -> str:
        threads.add(threading.current_thread())
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING):
        pulse = MetricsPulse(fetch)
        wait_for(lambda: pulse.latest() is not None)
        pulse.close()

    assert threading.current_thread() not in threads and len(threads) == 1
    assert [m for m in caplog.messages if "refused" in m] == ["vLLM's metrics can't be read: refused"]


def test_an_old_scrape_is_no_reading():
    now = [100.0]
    pulse = MetricsPulse(lambda: METRICS, clock=lambda: now[0])
    wait_for(lambda: pulse.latest() is not None)
    pulse.close()
    pulse._thread.join()

    now[0] += STALE_S + 0.1

    assert pulse.latest() is None


def test_scraping_too_often_is_refused():
    with pytest.raises(ValueError, match="slows vLLM down"):
        MetricsPulse(lambda: METRICS, period_s=0.1)


def test_the_shared_file_is_preferred_and_metrics_are_the_fallback(tmp_path):
    now, fetched = [0.0], []

    def fetch() -> str:
        fetched.append(1)
        return METRICS

    pulse = Pulse(tmp_path, fetch, clock=lambda: now[0])
    wait_for(lambda: pulse.latest() is not None)  # the first call starts the polling
    reading = pulse.latest()
    assert reading is not None and reading.source == "metrics" and fetched

    writer = PulseWriter(tmp_path / "pulse.state")  # vLLM with our plugin comes up
    writer.record([0.02], running=1, waiting=0)
    now[0] += StatePulse.RETRY_S
    reading = pulse.latest()
    assert reading is not None and (reading.source, reading.tokens) == ("state", 1)
    assert sum(reading.histogram) == 1
    assert pulse._metrics is None  # vLLM is not scraped any more
    pulse.close()


def test_vllm_restarted_with_a_new_runtime_directory(tmp_path):
    now = [0.0]
    pulse = StatePulse(tmp_path, clock=lambda: now[0])
    old = PulseWriter(tmp_path / "pulse.state")
    old.record([0.01] * 3, running=1, waiting=0)
    first = pulse.latest()
    assert first is not None and first.tokens == 3
    old.close()
    (tmp_path / "pulse.state").unlink()
    assert pulse._reader is not None
    pulse._reader._looked_up = float("-inf")
    assert pulse.latest() is None

    PulseWriter(tmp_path / "pulse.state").record([0.01], running=1, waiting=0)
    now[0] += StatePulse.RETRY_S

    second = pulse.latest()
    assert second is not None and second.tokens == 1


def test_a_broken_pulse_file_is_said_once(tmp_path, caplog):
    (tmp_path / "pulse.state").write_bytes(b"junk")
    now = [0.0]
    pulse = StatePulse(tmp_path, clock=lambda: now[0])

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert pulse.latest() is None
            now[0] += 1.0

    assert len(caplog.messages) == 1 and "not a pulse file" in caplog.messages[0]
