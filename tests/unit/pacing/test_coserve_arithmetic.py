"""The co-serving benchmark's own arithmetic: rates of a job's steps, shares of what was alone."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[3] / "bench"
SPEC = importlib.util.spec_from_file_location("bench_coserve", BENCH / "coserve.py")
assert SPEC and SPEC.loader
coserve = importlib.util.module_from_spec(SPEC)
sys.modules["bench_coserve"] = coserve
SPEC.loader.exec_module(coserve)


def training(steps):
    made = object.__new__(coserve.Training)
    made.steps = steps
    return made


def test_rate_of_steps_that_straddle_the_measured_time():
    steps = [(float(t), 100, 1.0) for t in range(1, 12)]  # 100 tokens a second, a step ends every second

    assert training(steps).tokens_per_s(2.5, 4.0) == pytest.approx(100)


def test_rate_counts_the_pauses_between_steps():
    steps = [(2.0, 100, 0.5), (4.0, 100, 0.5), (6.0, 100, 0.5)]  # 0.5 s of work every 2 s

    assert training(steps).tokens_per_s(2.0, 4.0) == pytest.approx(50)


def test_rate_without_steps_is_zero():
    assert training([]).tokens_per_s(0.0, 5.0) == 0.0
    assert training([(1.0, 100, 1.0)]).tokens_per_s(3.0, 5.0) == 0.0


def test_full_speed_is_when_steps_are_as_fast_as_alone():
    # Traffic ends at 10.0; a slow step is under way until 10.4, the next still takes long, then steps take 0.5 s.
    steps = [(9.0, 1, 3.0), (10.4, 1, 1.4), (11.4, 1, 1.0), *((11.9 + 0.5 * i, 1, 0.5) for i in range(8))]

    assert coserve.full_speed_after(training(steps), 10.0, 0.5) == pytest.approx(1.4, abs=0.01)
    assert coserve.full_speed_after(training(steps[:3]), 10.0, 0.5) is None  # never as fast as alone


def test_seconds_without_a_token_do_not_hold_a_budget():
    windows = [{"p50_ms": 8.0, "mean_ms": 9.0}, {"p50_ms": 0.0, "mean_ms": 12.0}]

    assert coserve.windows_held(windows, 10.0, 2) == 0.5
    assert coserve.windows_held(windows, 10.0, 4) == 0.25


def entry(mode, tokens, train=None, part="share"):
    load = {"streams": 4, "rate": None, "output_tokens_per_s": tokens, "itl_ms": {"p50": 10.0, "p99": 20.0},
            "ttft_ms": {"p50": 100.0, "p99": 200.0}}
    return part, mode, load, train


def test_shares_are_of_the_same_load_alone_on_the_same_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(coserve, "hardware", lambda device: {"kind": device})
    args = SimpleNamespace(device="cpu", out=tmp_path / "r.json", shape=None, model=Path("m"), optimizer="sgd",
                           prompt_tokens=1, output_tokens=1, train_tokens=1, seconds=1.0, serve_share=0.9,
                           append=False, parts=["share"])
    report = coserve.Report(args)
    report.add(*entry("serving alone", 200.0))
    report.add("share", "training alone", train=1000.0)

    both = report.add(*entry("both", 150.0, 600.0, part="pace"))  # another part of the same stack

    report.add(*entry("serving alone", 400.0, part="timeslice"))
    assert report.add(*entry("both", 100.0, part="timeslice"))["shares"]["serving"] == 0.25

    assert both["shares"] == {"serving": 0.75, "itl_p50": 1.0, "itl_p99": 1.0, "ttft_p50": 1.0, "ttft_p99": 1.0,
                              "training": 0.6, "sum": 1.35}
    assert (tmp_path / "r.json").stat().st_size > 0


def test_the_plot_is_drawn_from_the_data(tmp_path):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(BENCH))
    try:
        from plots import plot_coserve
    finally:
        sys.path.remove(str(BENCH))
    windows = [{"t": t, "tokens": 10, "p50_ms": 10.0 + t, "mean_ms": 11.0} for t in range(5)]
    load = {"streams": 4, "rate": None, "windows": windows}
    shares = {"serving": 0.9, "training": 0.8}
    data = {"model": "m", "device": {"kind": "cpu"}, "measurements": [
        {"part": "pace", "mode": "serving alone", "load": load, "shares": {}},
        {"part": "pace", "mode": "budget", "load": load, "shares": shares, "itl_budget_ms": 12.0},
        {"part": "share", "mode": "both", "load": {**load, "streams": None, "rate": 0.5}, "shares": shares}]}

    plot_coserve(data, tmp_path / "p.png")

    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plot_coserve({**data, "measurements": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
