"""The governor's rule against traffic: steady, in bursts, silent, too much, unseen. In virtual time."""

import logging
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plant import Arrivals, Parts, Plant, Traffic

from hogwild.errors import ConfigError
from hogwild.gpu_worker.governor import Controller, Governor, GovernorConfig, class_of
from hogwild.gpu_worker.partition import PARTS
from hogwild.gpu_worker.pulse import Reading

BUDGET = GovernorConfig(itl_budget_ms=8.75)  # 1.25 times the 7 ms that the plant takes alone


def steady(running: int) -> Traffic:
    return Traffic(lambda t: (running, 0))


@pytest.mark.parametrize("running", [1, 64])
@pytest.mark.parametrize("slowdown", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steady_traffic_keeps_the_budget_and_training_gets_what_is_left(running, slowdown, noise):
    plant = Plant(BUDGET, steady(running), slowdown=slowdown, noise=noise).run(40)

    assert plant.windows_held(8.75e-3, 1, 40) >= 0.99
    # What a rule that knew the plant could give: the share at which the mean meets the budget.
    ideal = min(1.0, (1 - 1 / 1.25) * (1 + slowdown) / slowdown)
    assert plant.training_share(5, 40) >= 0.55 * ideal


def test_training_that_costs_serving_nothing_is_not_slowed():
    plant = Plant(BUDGET, steady(16), slowdown=0.02).run(30)

    assert plant.training_share(2, 30) >= 0.95  # the rest are probes


def test_serve_share_leaves_vllm_its_share():
    plant = Plant(GovernorConfig(serve_share=0.9), steady(16), noise=0.1).run(40)

    assert plant.itl_s(1, 40) <= 7e-3 / 0.9
    assert plant.training_share(1, 40) >= 0.08


def test_the_stricter_of_both_targets_counts():
    both = Plant(GovernorConfig(itl_budget_ms=20, serve_share=0.9), steady(16)).run(20)
    share = Plant(GovernorConfig(serve_share=0.9), steady(16)).run(20)

    assert both.itl_s(1, 20) == pytest.approx(share.itl_s(1, 20), rel=0.02)


def test_bursts_are_served_from_their_first_second():
    plant = Plant(BUDGET, Traffic(lambda t: (16 if t % 6 < 3 else 0, 0)), noise=0.1).run(120)

    assert plant.windows_held(8.75e-3, 0, 120) >= 0.99
    assert plant.training_share(3.0, 6.0) >= 0.95  # silence: everything for training
    first_tokens = [latency for t, _, latency in plant.emitted if 60 < t < 60.5]
    assert sum(first_tokens) / len(first_tokens) <= 8.75e-3


def test_a_part_of_the_device_gets_more_done_at_the_same_budget():
    # What an H100 does: all of it slows serving by 1.7, a quarter of it by 0.09.
    config = GovernorConfig(serve_share=0.9)
    whole = Plant(config, steady(16), slowdown=1.7, noise=0.05).run(40)
    divided = Plant(config, steady(16), slowdown=1.7, noise=0.05, parts=Parts()).run(40)

    assert divided.windows_held(7e-3 / 0.9, 5, 40) >= 0.97
    assert divided.itl_s(5, 40) <= 7e-3 / 0.9
    assert divided.training_share(5, 40) >= 1.8 * whole.training_share(5, 40)


@pytest.mark.parametrize("prompts", [0.03, 0.1, 0.3])
def test_prompts_read_between_the_tokens_are_not_taken_for_trainings_doing(prompts):
    """Requests that come and go: now and then a step takes five times as long, whether or not training runs."""
    def run(**options):
        return Plant(GovernorConfig(serve_share=0.9), steady(64), slowdown=1.7, noise=0.05, prompts=prompts, **options)

    told, untold = run(parts=Parts()).run(40), run(parts=Parts(), tells_prompts=False).run(40)
    alone = run()
    alone.advance(40, training=False)

    assert told.itl_s(5, 40) <= alone.itl_s(5, 40) / 0.9  # of all tokens
    assert told.training_share(5, 40) >= 0.15
    assert untold.itl_s(5, 40) <= 1.03 * alone.itl_s(5, 40) / 0.9  # known less well, held all the same


def poisson(rate: float, seed: int, serve_share: float = 0.9, **options) -> Plant:
    """An 8B model on an H100: training makes a token take 2.7 times as long on all of it, 1.18 times on a quarter."""
    return Plant(GovernorConfig(serve_share=serve_share), Arrivals(rate, seed=seed), slowdown=1.7,
                 alone=lambda n: 7.15e-3 + 2.2e-5 * n, part_slowdown=0.7, noise=0.02, seed=seed, **options)


@pytest.mark.parametrize("rate", [5, 12, 21.6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("divided", [True, False])
def test_requests_at_random_leave_training_its_share_and_serving_its_own(rate, seed, divided):
    """Windows that are as far apart as the budget is from `alone`, for no reason of training's."""
    plant = poisson(rate, seed, parts=Parts() if divided else None).run(100)
    alone = poisson(rate, seed)
    alone.advance(100, training=False)

    assert plant.decoded_itl_s(5, 100) <= alone.decoded_itl_s(5, 100) / 0.9
    slowdown, part = (0.25 * 0.7, 0.25) if divided else (1.7, 1.0)
    ideal = part * (1 - 0.9) * (1 + slowdown) / slowdown
    assert plant.training_share(5, 100) >= 0.5 * ideal


def test_a_budget_far_below_the_traffics_noise_is_held_on_average():
    """5 % between windows that are 8 % apart: what one of them says is not enough."""
    latencies = []
    for seed in range(4):
        plant, alone = poisson(21.6, seed, serve_share=0.95, parts=Parts()).run(100), poisson(21.6, seed)
        alone.advance(100, training=False)
        latencies.append(plant.decoded_itl_s(5, 100) / alone.decoded_itl_s(5, 100))

    assert sum(latencies) / len(latencies) <= 1 / 0.95


@pytest.mark.parametrize("seed", range(3))
def test_training_that_becomes_costlier_is_cut_back_within_seconds_however_noisy_the_traffic(seed):
    plant = poisson(21.6, seed)
    plant.slowdown = 0.5
    plant.run(60)
    before = plant.training_share(40, 60)
    plant.slowdown = 3.0
    plant.run(14)

    assert before >= 0.15
    assert plant.training_share(64, 74) <= (1 - 0.9) * 4 / 3  # all that the budget has room for now


def test_a_load_in_which_every_step_reads_prompts_is_paced_too():
    plant = Plant(GovernorConfig(serve_share=0.9), steady(64), slowdown=1.7, prompts=1.0).run(30)

    assert plant.longest_yield_s < 2.5
    assert 0.04 <= plant.training_share(5, 30) <= 0.5


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_parts_do_not_change_with_every_step(share):
    plant = Plant(GovernorConfig(serve_share=share), steady(16), slowdown=1.7, noise=0.1, parts=Parts()).run(60)

    assert len(plant.parts.moves) <= 10  # of some hundred steps
    assert plant.parts.share < 1.0


@pytest.mark.parametrize("stops_at", [10.0, 10.3, 10.6, 10.9, 11.2])
@pytest.mark.parametrize("step_layers", [92, 1000])  # whatever is left of the step
def test_silence_gives_the_whole_device_before_the_next_layer(stops_at, step_layers):
    traffic = Traffic(lambda t: (64 if t < stops_at else 0, 0))
    plant = Plant(GovernorConfig(serve_share=0.95), traffic, slowdown=1.7, parts=Parts(), step_layers=step_layers)
    plant.run(15)

    assert plant.training_share(stops_at - 2, stops_at) < 0.4
    assert plant.training_share(stops_at + 0.1, 15) > 0.999


def test_traffic_that_begins_in_the_middle_of_a_step_gets_its_part_before_the_next_layer():
    traffic = Traffic(lambda t: (16 if t > 2.0 else 0, 0))
    plant = Plant(GovernorConfig(serve_share=0.9), traffic, slowdown=1.7, parts=Parts(), step_layers=1000).run(4)

    assert plant.parts.moves[0] in PARTS  # all of it is never used once a request runs
    assert plant.itl_s(2.1, 4) <= 7e-3 / 0.9


def test_a_probe_does_not_choose_a_part():
    plant = Plant(BUDGET, steady(16), slowdown=1.7, parts=Parts(), step_layers=3).run(20)

    assert set(plant.parts.moves) <= set(PARTS)
    assert plant.parts.share in PARTS


@pytest.mark.parametrize("layer_s", [0.003, 0.004, 0.008])
@pytest.mark.parametrize("token_s", [0.007, 0.03])
def test_a_probe_begins_when_what_training_had_queued_is_done(layer_s, token_s):
    """A quarter of a GPU takes four times as long for a layer, and that goes on when training has decided to yield."""
    plant = Plant(GovernorConfig(serve_share=0.8), steady(1), slowdown=1.7, parts=Parts(), part_slowdown=0.9,
                  alone=lambda n: token_s, layer_s=layer_s, ahead=True).run(30)

    assert plant.governor.controller.classes[1].alone_s == pytest.approx(token_s, rel=0.002)
    assert plant.training_share(5, 30) >= 0.15


@pytest.mark.parametrize("prompts", [0.003, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_in_ms_is_held_in_every_second_by_prompts_and_tokens_together(prompts, seed):
    """What was promised to clients is the time between their tokens, whatever vLLM does meanwhile."""
    def run(config):
        return Plant(config, steady(16), slowdown=1.7, noise=0.1, prompts=prompts, parts=Parts(), part_slowdown=0.7,
                     ahead=True, seed=seed)

    alone, plant = run(GovernorConfig()), run(BUDGET).run(120)
    alone.advance(120, training=False)

    assert alone.seconds_held(8.75e-3, 20, 120) == 1.0
    assert plant.seconds_held(8.75e-3, 20, 120) >= 0.98
    assert plant.training_share(20, 120) >= 0.07


def test_a_budget_that_prompts_use_up_leaves_training_at_the_floor_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        plant = Plant(BUDGET, steady(16), prompts=0.1, noise=0.05, parts=Parts(), ahead=True).run(60)

    assert plant.training_share(30, 60) <= 0.06
    assert plant.governor.status()["mode"] == "floor"
    assert "prompts" in plant.governor.status()["note"]
    assert "prompts" in caplog.text


def test_silence_gives_full_speed_within_a_second():
    plant = Plant(BUDGET, Traffic(lambda t: (64 if t < 10 else 0, 0)), slowdown=3.0).run(13)

    assert plant.training_share(9, 10) < 0.5
    assert plant.training_share(11, 13) > 0.999
    assert plant.governor.controller.mode == "idle"


def test_requests_whose_client_hung_up_count_as_silence():
    # vLLM reports the last aborted request as running until its next step, which never comes.
    traffic = Traffic(lambda t: (4, 0))
    plant = Plant(BUDGET, traffic).run(10)
    plant.alone = lambda n: float("inf")
    plant.run(4)

    assert plant.training_share(12.5, 14) > 0.999
    assert plant.governor.controller.mode == "idle"


def test_overload_leaves_training_at_the_floor_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        plant = Plant(BUDGET, Traffic(lambda t: (16, 50)), alone=lambda n: 0.010).run(30)

    assert plant.training_share(2, 30) == pytest.approx(0.05, abs=0.01)
    status = plant.governor.status()
    assert status["mode"] in ("floor", "probing")
    assert len(caplog.messages) == 1  # once a minute, not once a window
    assert "above the budget of 8.8 ms" in caplog.messages[0]


def test_duty_does_not_rise_while_the_queue_grows():
    growing = Plant(BUDGET, Traffic(lambda t: (16, int(20 * t))), slowdown=0.0).run(5)
    level = Plant(BUDGET, Traffic(lambda t: (16, 20)), slowdown=0.0).run(5)

    assert growing.governor.controller.duty == pytest.approx(BUDGET.first_duty)
    assert level.governor.controller.duty == 1.0


def test_a_long_prompt_without_tokens_does_not_hold_training_up():
    plant = Plant(BUDGET, Traffic(lambda t: (1, 0), decoding=lambda t: t > 20)).run(20)

    assert plant.training_share(2, 20) > 0.05
    assert plant.longest_yield_s < 1.2


def test_load_that_changes_all_the_time():
    walk = random.Random(1)
    loads = [walk.choice([1, 2, 4, 8, 16, 20, 33, 64]) for _ in range(200)]
    plant = Plant(GovernorConfig(itl_budget_ms=11), Traffic(lambda t: (loads[int(t / 0.7)], 0)),
                  alone=lambda n: 0.007 + 2e-5 * n, noise=0.1).run(100)

    assert plant.windows_held(11e-3, 1, 100) >= 0.99
    assert plant.training_share(1, 100) >= 0.25


def test_metrics_polled_four_times_a_second_are_enough_to_hold_the_mean():
    plant = Plant(BUDGET, steady(16), noise=0.1, pulse_period_s=0.25).run(60)

    assert plant.itl_s(3, 60) <= 8.75e-3
    assert plant.training_share(3, 60) >= 0.2


def test_cpu_sized_steps():
    """Two cores: tokens take 100 ms, layers 20 ms."""
    plant = Plant(GovernorConfig(itl_budget_ms=125), steady(2), alone=lambda n: 0.1, layer_s=0.02, noise=0.05).run(120)

    assert plant.windows_held(0.125, 2, 120) >= 0.97
    assert plant.training_share(2, 120) >= 0.12


@pytest.mark.parametrize("gone_at", [0.0, 5.0, 5.05, 10.1])  # from the start, while pacing, in the middle of a probe
def test_metrics_that_vanish_leave_training_at_half_duty(gone_at, caplog):
    with caplog.at_level(logging.WARNING):
        plant = Plant(BUDGET, steady(16), visible=lambda t: t < gone_at).run(gone_at + 6)

    assert plant.training_share(gone_at + 3, gone_at + 6) == pytest.approx(0.5, abs=0.03)
    assert plant.longest_yield_s < 2.5
    assert plant.governor.status()["mode"] == "blind"
    assert sum("can't be read" in message for message in caplog.messages) == 1


def test_metrics_that_come_back_are_followed_again():
    plant = Plant(BUDGET, steady(16), visible=lambda t: not 5 < t < 12).run(25)

    assert plant.governor.controller.mode == "pacing"
    assert plant.windows_held(8.75e-3, 14, 25) >= 0.99


def test_a_restarted_vllm_does_not_give_negative_latencies():
    plant = Plant(BUDGET, steady(16)).run(5)
    plant.tokens, plant.itl_sum_s, plant.histogram = 0, 0.0, [0] * len(plant.histogram)
    plant.run(5)

    assert plant.governor.controller.itl_s == pytest.approx(8.3e-3, rel=0.1)
    assert plant.windows_held(8.75e-3, 6, 10) == 1.0


def test_without_a_target_nothing_yields():
    plant = Plant(GovernorConfig(), steady(64)).run(5)

    assert plant.training_share(0, 5) == pytest.approx(1.0)
    assert plant.governor.status()["mode"] == "off"


def test_time_that_training_stood_still_is_not_work():
    plant = Plant(BUDGET, steady(16), slowdown=3.0).run(5)
    before = plant.governor.active_s
    plant.advance(60, training=False)  # a pause
    plant.governor.begin_work()
    plant.governor.yield_point()

    assert plant.governor.active_s == before


@pytest.mark.parametrize("pause_s", [0.09, 0.11, 0.3])
def test_short_steps_with_pauses_between_them_are_judged_and_the_pauses_count_as_rest(pause_s: float):
    """Given training that hardly costs anything, in steps of 33 ms, and a ledger on a slow disk."""
    plant = Plant(GovernorConfig(serve_share=0.9), steady(16), slowdown=0.02)
    for _ in range(int(20 / (0.033 + pause_s))):
        plant.governor.begin_work()
        plant.run(0.033)
        plant.governor.worked()
        plant.advance(pause_s, training=False)

    assert plant.governor.controller.duty == 1.0
    assert plant.governor.active_s + plant.governor.yielded_s == pytest.approx(plant.t, abs=0.5)
    assert plant.governor.active_s == pytest.approx(plant.training_share(0, plant.t) * plant.t, rel=0.05)


def test_a_yield_inside_a_step_waits_for_the_device_first():
    calls: list[str] = []

    class Queue:
        def bound(self):
            calls.append("bound")

        def drain(self):
            calls.append("drain")

    class Vllm:
        running = 0

        def latest(self):
            return Reading(at=clock[0], tokens=0, itl_sum_s=0, running=self.running, waiting=0, updated=clock[0])

        def close(self):
            calls.append("closed")

    clock, vllm = [0.0], Vllm()

    def sleep(seconds: float) -> None:
        calls.append("sleep")
        clock[0] += seconds

    governor = Governor(BUDGET, vllm, device=Queue(), clock=lambda: clock[0], sleep=sleep)
    governor.yield_point()
    assert calls == ["bound"]
    vllm.running, clock[0] = 1, 1.0
    governor.yield_point()
    assert calls[1:3] == ["drain", "sleep"]
    governor.close()
    assert calls[-1] == "closed"


@pytest.mark.parametrize("bad", [{"itl_budget_ms": 0}, {"itl_budget_ms": -1}, {"serve_share": 0}, {"serve_share": 1.5},
                                 {"floor": 0}])
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=r"HOGWILD_ITL_BUDGET_MS|HOGWILD_SERVE_SHARE|floor"):
        GovernorConfig(**bad)


def test_load_classes_have_hysteresis():
    assert class_of(0, None) == 0
    assert [class_of(n, None) for n in (1, 2, 3, 4, 15, 16, 64)] == [1, 2, 2, 3, 4, 5, 7]
    assert class_of(16, 4) == 4  # 8 to 15, kept up to 21
    assert class_of(22, 4) == 5
    assert class_of(7, 4) == 4
    assert class_of(5, 4) == 3


readings = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 500), st.floats(0, 2), st.integers(0, 300),
                              st.integers(0, 300), st.booleans(), st.booleans()), max_size=60)


# vLLM goes out of sight in the middle of a probe and is back at once.
OUT_OF_SIGHT = [(0.5, 0, 0.01, 300, 0, True, False), (2.0, 0, 0.01, 300, 1, True, False),
                (3.0, 0, 0.0, 0, 0, False, False), (0.0, 500, 0.0, 300, 0, True, False),
                (3.0, 500, 0.0, 1, 0, True, False)]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(readings, st.floats(0.5, 500), st.none() | st.floats(0.01, 1))
@example(OUT_OF_SIGHT, 1.0, None)
def test_any_traffic_gives_a_duty_between_floor_and_one_and_mostly_work(events, budget_ms, share):
    """Given any sequence of readings, gaps, restarts, when the rule has seen it, then duty stays in its range, probes
    take a third of the time at most, and silence gives full speed at once."""
    rule = Controller(GovernorConfig(itl_budget_ms=budget_ms, serve_share=share))
    now, tokens, itl_sum, duty, probing = 0.0, 0, 0.0, 1.0, 0.0
    for gap, new, itl, running, waiting, seen, restart in events:
        now += gap
        probing += gap if duty == 0.0 else 0.0
        if restart:
            tokens, itl_sum = 0, 0.0
        tokens, itl_sum = tokens + new, itl_sum + new * itl
        reading = Reading(at=now, tokens=tokens, itl_sum_s=itl_sum, running=running, waiting=waiting, updated=now)
        duty = rule.observe(reading if seen else None, now, active_s=now / 2, yielded_s=now / 2)

        assert duty == 0.0 or rule.config.floor <= duty <= 1.0
        assert probing <= now / 3 + 2 * rule.config.probe_max_s + 3.0  # 3.0: the longest gap between readings here
        if seen and running == waiting == 0 and gap > 0:
            assert duty == 1.0


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 5), st.floats(1.15, 3), st.sampled_from([0.002, 0.004, 0.008]), st.integers(0, 10_000))
def test_the_mean_is_held_on_any_plant_that_can_hold_it(slowdown, margin, layer_s, seed):
    plant = Plant(GovernorConfig(itl_budget_ms=7 * margin), steady(8), slowdown=slowdown, layer_s=layer_s, noise=0.05,
                  seed=seed).run(20)

    assert plant.itl_s(3, 20) <= 7e-3 * margin
    assert plant.training_share(3, 20) >= 0.05
