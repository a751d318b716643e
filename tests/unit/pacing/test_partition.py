"""Which part of the card a step runs on; the card itself is in tests/gpu/test_partition_gpu.py."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogwild.gpu_worker.governor import part_for
from hogwild.gpu_worker.partition import PARTS, Placement


@pytest.mark.parametrize(("duty", "current", "part"), [
    (1.0, 1.0, 0.75),  # beside traffic never all of it
    (0.2, 1.0, 0.25),  # traffic began
    (0.24, 1.0, 0.25),
    (0.31, 0.25, 0.5),
    (0.27, 0.25, 0.25),  # a little more than the part: not worth moving
    (0.24, 0.5, 0.5),  # only just enough: not worth moving
    (0.17, 0.5, 0.25),
    (0.49, 1.0, 0.5),
    (0.01, 0.75, 0.25),  # the smallest there is; the rest is yielded
    (0.9, 0.5, 0.75),
])  # fmt: skip
def test_the_part_for_a_duty(duty, current, part):
    assert part_for(duty, current, PARTS) == part


@given(st.floats(0.001, 1.0), st.sampled_from([*PARTS, 1.0]))
def test_a_part_holds_the_duty_and_stays_when_asked_again(duty, current):
    part = part_for(duty, current, PARTS)

    assert duty <= part / 0.8 or part == PARTS[-1]
    assert part_for(duty, part, PARTS) == part


def test_the_cpu_has_no_parts():
    placement = Placement.on(torch.device("cpu"))

    assert placement.parts == () and placement.share == 1.0
    with placement.entered():
        pass


def missing(*_):
    """What cuda-bindings raises when the driver is older than 12.4."""
    raise RuntimeError('Function "cuDeviceGetDevResource" not found')


@pytest.mark.parametrize("name", ["cuDeviceGetDevResource", "nothing_at_all"])  # an old driver, old bindings
def test_a_driver_without_green_contexts_is_no_error(monkeypatch, name):
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0), CUdevResourceType=SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1),
        CUdevice_attribute=SimpleNamespace(CU_DEVICE_ATTRIBUTE_MPS_ENABLED=133),
        cuDeviceGet=lambda index: (0, index), cuDeviceGetAttribute=lambda what, card: (0, 1),
        **{name: missing})  # fmt: skip
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    assert Placement.on(torch.device("cuda", 0)).parts == ()
