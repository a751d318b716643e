"""Which part of the card a step runs on; the card itself is in tests/gpu/test_partition_gpu.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogwild.gpu_worker.partition import PARTS, Placement, part_for


@pytest.mark.parametrize(("duty", "current", "part"), [
    (1.0, 1.0, 1.0),
    (0.2, 1.0, 0.25),  # traffic began
    (0.24, 1.0, 0.25),
    (0.26, 0.25, 0.5),  # the part is full: up at once
    (0.24, 0.5, 0.5),  # only just enough: not worth moving
    (0.2, 0.5, 0.25),
    (0.49, 1.0, 0.5),
    (0.01, 0.75, 0.25),  # the smallest there is; the rest is yielded
    (0.9, 0.5, 1.0),
])  # fmt: skip
def test_the_part_for_a_duty(duty, current, part):
    assert part_for(duty, current, PARTS) == part


@given(st.floats(0.001, 1.0), st.sampled_from([*PARTS, 1.0]))
def test_a_part_holds_the_duty_and_stays_when_asked_again(duty, current):
    part = part_for(duty, current, PARTS)

    assert duty <= part
    assert part_for(duty, part, PARTS) == part


def test_without_parts_it_is_the_whole_device():
    assert part_for(0.1, 1.0, ()) == 1.0
    placement = Placement.on(torch.device("cpu"))
    assert not placement.choose(0.1)
    assert placement.share == 1.0
    with placement.entered():
        pass
