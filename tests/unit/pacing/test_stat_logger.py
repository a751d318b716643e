"""The stat logger inside vLLM: publishes, and never breaks serving. Uses vLLM's own classes where it is installed."""

import logging
from types import SimpleNamespace

import pytest

from hogwild.pulse_state import PulseReader

pytest.importorskip("vllm.v1.metrics.loggers", reason="vLLM is not installed here")

from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from hogwild.vllm_plugin.stats import PulseStatLogger


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("HOGWILD_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("HOGWILD_MODEL", raising=False)
    monkeypatch.delenv("HOGWILD_SERVED_MODEL_NAME", raising=False)
    directory = tmp_path / "tiny"
    directory.mkdir(mode=0o700)
    return directory


def config(name="tiny"):
    return SimpleNamespace(model_config=SimpleNamespace(served_model_name=name, model="/models/x"))


def test_engine_steps_reach_the_file_as_vllm_reports_them(runtime):
    logger = PerEngineStatLoggerAdapter(config(), [0], PulseStatLogger)  # how vLLM calls a plugin

    logger.record(
        SchedulerStats(num_running_reqs=2, num_waiting_reqs=1), decoded(0.01, 0.03), mm_cache_stats=None, engine_idx=0
    )
    logger.record(None, None)
    logger.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=1), decoded(0.02), mm_cache_stats=None)
    logger.log_engine_initialized()
    logger.log()

    counters = PulseReader(runtime / "pulse.state").read()
    assert counters is not None
    assert (counters.tokens, counters.running, counters.waiting) == (2, 2, 1)  # a step's tokens come with the next
    assert counters.itl_sum_s == pytest.approx(0.04)


def decoded(*latencies, first=()):
    iteration = IterationStats()
    iteration.inter_token_latencies_iter, iteration.time_to_first_tokens_iter = list(latencies), list(first)
    return iteration


def test_steps_that_read_prompts_and_those_before_them_are_told_from_those_that_only_decode(runtime):
    """vLLM takes the time of a step after it launched the next: that of a prompt makes the tokens before it late."""
    logger = PulseStatLogger(config())
    for step in (
        decoded(0.01, 0.01),
        decoded(0.03, 0.03),
        decoded(0.05, 0.05, first=[0.2]),
        decoded(0.01, 0.01, 0.01),
        decoded(0.01, 0.01, 0.01),
    ):
        logger.record(SchedulerStats(num_running_reqs=3), step)

    counters = PulseReader(runtime / "pulse.state").read()
    assert counters is not None
    assert (counters.tokens, counters.mixed_tokens, sum(counters.histogram)) == (9, 4, 5)
    assert (counters.itl_sum_s, counters.mixed_sum_s) == (pytest.approx(0.21), pytest.approx(0.16))


def test_silence_leaves_no_token_uncounted(runtime):
    logger = PulseStatLogger(config())
    for running, step in ((1, decoded(first=[0.2])), (1, decoded(0.01)), (0, decoded(0.02)), (0, decoded())):
        logger.record(SchedulerStats(num_running_reqs=running), step)

    counters = PulseReader(runtime / "pulse.state").read()
    assert counters is not None
    assert (counters.tokens, counters.mixed_tokens, counters.running) == (2, 0, 0)
    assert counters.itl_sum_s == pytest.approx(0.03)


def test_vllm_accepts_the_class():
    assert issubclass(PulseStatLogger, StatLoggerBase)


def test_nothing_is_written_where_nothing_was_exported(runtime):
    PulseStatLogger(config("another")).record(SchedulerStats(), IterationStats())

    assert not (runtime.parent / "another").exists()


def test_nothing_is_written_beside_the_vllm_whose_weights_are_trained(runtime, monkeypatch):
    monkeypatch.setattr("hogwild.vllm_plugin.stats.withheld", lambda config: "another vLLM has the name")
    PulseStatLogger(config()).record(SchedulerStats(), IterationStats())

    assert not (runtime / "pulse.state").exists()


def test_nothing_is_written_when_hogwild_is_switched_off(runtime, monkeypatch):
    monkeypatch.setenv("HOGWILD_DISABLE", "1")
    PulseStatLogger(config()).record(SchedulerStats(), IterationStats())

    assert not (runtime / "pulse.state").exists()


def test_a_directory_others_can_write_to_is_not_used(runtime):
    runtime.chmod(0o777)
    PulseStatLogger(config()).record(SchedulerStats(), IterationStats())

    assert not (runtime / "pulse.state").exists()


def test_a_statistic_that_changed_its_shape_silences_the_logger_only(runtime, caplog):
    logger = PulseStatLogger(config())

    with caplog.at_level(logging.ERROR):
        logger.record(SimpleNamespace(renamed=1), SimpleNamespace())
        logger.record(SimpleNamespace(renamed=1), SimpleNamespace())

    assert len([m for m in caplog.messages if "pulse stopped" in m]) == 1


def test_a_config_of_another_shape_does_not_stop_vllm(runtime, caplog):
    with caplog.at_level(logging.ERROR):
        PulseStatLogger(SimpleNamespace()).record(SchedulerStats(), IterationStats())

    assert "will read /metrics instead" in caplog.messages[0]
