"""Samples and the order they are trained in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogwild.errors import InvalidRequest
from hogwild.gpu_worker.batch import Sample, check_tokens, collate, plan_steps
from hogwild.gpu_worker.config import TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ([1], []),
        ([], [1]),
        ([1], [2], [1.0, 1.0]),
        ([1], [2], [0.0]),
        ([1], [2], [-1.0]),
        ([1], [2], [float("inf")]),
        ([], [1, 2], [1.0, 0.0]),  # the only weighted token has no predecessor
    ],
)
def test_sample_without_anything_to_learn_is_refused(arguments: tuple[list[int], ...]) -> None:
    with pytest.raises(InvalidRequest):
        Sample(*arguments)


@pytest.mark.parametrize(("ids", "bad"), [([0, 9], False), ([10], True), ([-1], True), ([1.5], True), ([[1]], True)])
def test_token_outside_the_vocabulary_is_refused(ids: list[int], bad: bool) -> None:
    samples = [Sample([1], [2]), Sample(ids, [3])]
    if bad:
        with pytest.raises(InvalidRequest) as e:
            check_tokens(samples, vocab_size=10, max_tokens=None)
        assert e.value.details["sample"] == 1
    else:
        check_tokens(samples, vocab_size=10, max_tokens=None)


def test_sample_longer_than_the_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="5 input tokens"):
        check_tokens([Sample([1, 2, 3], [4, 5, 6])], vocab_size=10, max_tokens=4)


def test_samples_stand_side_by_side_in_a_pack() -> None:
    # Given one sample with weights and one without context
    batch = collate([Sample([1, 2], [3, 4], [0.5, 2.0]), Sample([], [5, 6, 7])], CPU)
    # Then positions start again, each predictor is followed by its target, and last tokens stay out
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predictors.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [3, 4, 6, 7]
    assert batch.weights.tolist() == [0.5, 2.0, 1.0, 1.0]
    assert batch.lengths == (3, 2)


def test_numpy_samples_are_taken_as_lists_are() -> None:
    a = collate([Sample(np.array([1, 2], np.int32), np.array([3], np.int32))], CPU)
    assert torch.equal(a.input_ids, collate([Sample([1, 2], [3])], CPU).input_ids)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    size=st.integers(1, 64),
    epochs=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_epoch_holds_every_sample_once_in_packs_that_fit(
    lengths: list[int], size: int, epochs: int, accumulation: int, seed: int
) -> None:
    config = TrainConfig(epochs=epochs, gradient_accumulation=accumulation, seed=seed)
    steps = plan_steps(lengths, config, size)
    packs = [pack for step in steps for pack in step]
    assert sorted(i for pack in packs for i in pack) == sorted(list(range(len(lengths))) * epochs)
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= size for pack in packs)
    assert all(len(step) == accumulation for step in steps[:-1])
    assert steps == plan_steps(lengths, config, size)


def test_epochs_differ_in_order_unless_told_not_to_shuffle() -> None:
    lengths = [10] * 12
    mixed = plan_steps(lengths, TrainConfig(epochs=2), 10)
    assert mixed[:12] != mixed[12:]
    assert mixed != plan_steps(lengths, TrainConfig(epochs=2, seed=1), 10)
    kept = plan_steps(lengths, TrainConfig(epochs=2, shuffle=False), 10)
    assert kept == tuple(((i,),) for i in list(range(12)) * 2)


def test_steps_repeat_the_samples_until_done() -> None:
    assert len(plan_steps([10, 10, 10], TrainConfig(steps=7), 20)) == 7


def test_a_plan_that_would_not_fit_into_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (TrainConfig(epochs=100_000), TrainConfig(steps=1_000_000, gradient_accumulation=100_000)):
        with pytest.raises(InvalidRequest, match="one job may train 10,000,000"):
            plan_steps([10] * 101, config, 10)
    # How many samples the packs of a step hold is known when they are made
    monkeypatch.setattr("hogwild.gpu_worker.config.MOST_TRAINED", 100)
    assert len(plan_steps([10] * 20, TrainConfig(steps=10), 100)) == 10
    with pytest.raises(InvalidRequest, match=r"The first 13 steps train at least 120 samples.*Name fewer"):
        plan_steps([10] * 20, TrainConfig(steps=20), 100)


@pytest.mark.parametrize(
    ("samples", "per_epoch", "steps"), [(1, 1, 32), (3, 3, 33), (4, 4, 32), (96, 4, 32), (6000, 15, 120)]
)
def test_a_job_that_names_no_length_takes_eight_epochs_in_at_least_as_many_steps_as_they_should_have(
    samples: int, per_epoch: int, steps: int
) -> None:
    config, lengths = TrainConfig(), [10] * samples
    plan = plan_steps(lengths, config, config.pack_tokens(sum(lengths)))
    assert len(plan) == steps
    assert sorted(i for step in plan[:per_epoch] for pack in step for i in pack) == list(range(samples))
    # Whoever names a length gets full packs.
    assert TrainConfig(steps=3).pack_tokens(10) == TrainConfig(epochs=3).pack_tokens(10) == 4096
