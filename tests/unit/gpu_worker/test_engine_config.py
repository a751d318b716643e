"""A job's hyperparameters: bounds are checked by name, rates follow their schedule."""

import pytest

from hogwild.errors import InvalidRequest
from hogwild.gpu_worker.config import (
    DEFAULT_LEARNING_RATE,
    INTEGERS,
    MOST_PATTERNS,
    NUMBERS,
    OPTIMIZERS,
    REFERENCE_WIDTH,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 11.0),
        ("learning_rate", True),
        ("epochs", 0),
        ("steps", 2.5),
        ("steps", True),
        ("seed", -1),
        ("shuffle", 1),
        ("schedule", "step"),
        ("weight_decay", -0.1),
        ("gradient_accumulation", 0),
        ("trainable", ()),
        ("trainable", "*.mlp.*"),
        ("max_tokens_per_step", 0),
        ("max_nonfinite_steps", 0),
        ("rank", 0),
        ("scale", 0.0),
        ("scale", 1e5),
        ("replay", -1.0),
        ("replay_tokens", 0),
        ("learning_rate_multiplier", 0.0),
        ("trainable", ["*"] * (MOST_PATTERNS + 1)),
        ("trainable", ["*" * 201]),
        *((name, bounds["le"] + 1) for name, bounds in INTEGERS.items()),
    ],
)
def test_field_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as e:
        TrainConfig.from_dict({field: value})
    assert e.value.details["field"] == field


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS, "optimizer"])
@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), float("inf"), float("-inf"), float("nan"), [0] * 1000],
    ids=["huge", "-huge", "inf", "-inf", "nan", "list"],
)
def test_what_is_no_sane_number_is_refused_in_a_few_words(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as e:
        TrainConfig.from_dict({field: value})
    assert e.value.details["field"] == field
    assert len(e.value.message) < 200


def test_rank_without_the_optimizer_that_it_belongs_to_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'apollo'"):
        TrainConfig(optimizer="sgd", rank=4)


def test_scale_belongs_to_both_apollos() -> None:
    for optimizer in ("apollo", "apollo-mini"):
        assert TrainConfig.from_dict({"optimizer": optimizer, "scale": 128}).scale == 128
    with pytest.raises(InvalidRequest, match="not to 'adamw'") as e:
        TrainConfig(optimizer="adamw", scale=1.0)
    assert e.value.details["field"] == "scale"


def test_unknown_option_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="learning_rat'"):
        TrainConfig.from_dict({"learning_rat": 1e-4})


@pytest.mark.parametrize(
    ("options", "field", "count"),
    [
        ({"steps": 1_000_000, "gradient_accumulation": 100_000}, "steps", "100,000,000,000"),
        ({"steps": 101, "gradient_accumulation": 100_000}, "steps", "10,100,000"),
        ({"epochs": 100_000}, "epochs", "300,000,000"),
    ],
)
def test_a_job_too_long_for_a_plan_is_refused_with_numbers(options: dict[str, int], field: str, count: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{count} samples.*10,000,000\. Name fewer") as e:
        TrainConfig(**options).check_length(3000)
    assert e.value.details["field"] == field


def test_a_job_as_long_as_a_plan_may_be_is_taken() -> None:
    TrainConfig(steps=1_000_000, gradient_accumulation=10).check_length(100_000)
    TrainConfig(epochs=100_000).check_length(100)
    TrainConfig().check_length(1_250_000)


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        TrainConfig(epochs=1, steps=1)


def test_json_of_a_job_becomes_a_config() -> None:
    config = TrainConfig.from_dict({"optimizer": "apollo", "rank": 8, "trainable": ["*.mlp.*"], "steps": None})
    assert config == TrainConfig(optimizer="apollo", rank=8, trainable=("*.mlp.*",))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_has_a_default_rate(optimizer: str) -> None:
    assert TrainConfig(optimizer=optimizer).peak_rate == DEFAULT_LEARNING_RATE[optimizer] > 0
    half = TrainConfig(optimizer=optimizer, learning_rate_multiplier=0.5)
    assert half.peak_rate == 0.5 * DEFAULT_LEARNING_RATE[optimizer]


def test_default_rates_of_adaptive_optimizers_fall_with_the_width() -> None:
    assert TrainConfig().for_width(REFERENCE_WIDTH).peak_rate == TrainConfig().peak_rate
    assert TrainConfig().for_width(8 * REFERENCE_WIDTH).peak_rate == pytest.approx(TrainConfig().peak_rate / 8)
    assert TrainConfig().for_width(32).peak_rate == TrainConfig().peak_rate
    assert TrainConfig(optimizer="sgd").for_width(4096).peak_rate == DEFAULT_LEARNING_RATE["sgd"]
    given = TrainConfig(learning_rate=1e-3, learning_rate_multiplier=2.0)
    assert given.for_width(4096).peak_rate == pytest.approx(2e-3)
    with pytest.raises(InvalidRequest, match="at most 10"):
        TrainConfig(learning_rate=1.0, learning_rate_multiplier=11.0)


def test_warm_up_rises_to_the_peak_and_schedules_fall_from_it() -> None:
    linear = TrainConfig(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [linear.rate_at(i, 6) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    by_default = TrainConfig(learning_rate=1.0, schedule="constant")
    assert [by_default.rate_at(i, 24) for i in range(5)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0])
    assert by_default.rate_at(0, 7) == 1.0
    cosine = TrainConfig(learning_rate=1.0, schedule="cosine")
    rates = [cosine.rate_at(i, 4) for i in range(4)]
    assert rates[0] == 1.0
    assert rates[2] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0  # a step at rate zero would be wasted


def test_tokens_of_a_step_are_shared_by_its_packs() -> None:
    assert TrainConfig(max_tokens_per_step=1000, gradient_accumulation=4).pack_tokens(10_000) == 250
    with pytest.raises(InvalidRequest):
        TrainConfig(max_tokens_per_step=3, gradient_accumulation=4)
