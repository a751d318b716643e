"""Which part of the card a step runs on; the card itself is in tests/gpu/test_partition_gpu.py."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogwild.gpu_worker import partition
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


@pytest.fixture
def library(monkeypatch):
    """Which library torch would multiply matrices with: a build for the CPU has no choice."""
    chosen = ["usual"]

    def preferred(name=None):
        if name is not None:
            chosen.append(name)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    partition._usual_library.cache_clear()
    yield chosen
    torch._C._set_sm_carveout_experimental(None)
    partition._usual_library.cache_clear()


@pytest.mark.parametrize(("share", "left"), [(0.25, 132 - 36), (0.5, 132 - 68), (0.75, 132 - 100)])
def test_matrix_products_leave_the_other_multiprocessors_alone(library, share, left):
    placement = Placement(132)
    placement.move(share)

    assert placement.share == share
    assert torch._C._get_sm_carveout_experimental() == left
    assert library[-1] == "cublaslt"  # the only one that heeds it
    placement.move(1.0)
    assert torch._C._get_sm_carveout_experimental() is None
    assert library[-1] == "usual"


def test_a_new_worker_begins_on_the_whole_card(library):
    Placement(132).move(0.25)
    Placement(132)

    assert torch._C._get_sm_carveout_experimental() is None
    assert library[-1] == "usual"


def driver(**functions):
    """cuda-bindings on a card under MPS."""
    return SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUdevice_attribute=SimpleNamespace(CU_DEVICE_ATTRIBUTE_MPS_ENABLED=133),
        **{"cuDeviceGet": lambda index: (0, index), "cuDeviceGetAttribute": lambda what, card: (0, 1), **functions})


def missing(*_):
    """What cuda-bindings raises when the driver is too old."""
    raise RuntimeError('Function "cuDeviceGetAttribute" not found')


def without_carveout(patch):
    patch.delattr(torch._C, "_set_sm_carveout_experimental")


@pytest.mark.parametrize(("multiprocessors", "functions", "spoil", "parts"), [
    (132, {}, None, PARTS),
    (132, {"cuDeviceGetAttribute": lambda what, card: (0, 0)}, None, ()),  # no MPS
    (132, {"cuDeviceGetAttribute": lambda what, card: (SimpleNamespace(name="CUDA_ERROR"), None)}, None, ()),
    (132, {"cuDeviceGetAttribute": missing}, None, ()),
    (14, {}, None, ()),  # a slice of a card
    (132, {}, without_carveout, ()),  # another torch
])  # fmt: skip
def test_what_a_card_needs_to_be_divided(monkeypatch, library, multiprocessors, functions, spoil, parts):
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver(**functions)))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    partition._multiprocessors.cache_clear()
    with monkeypatch.context() as patch:
        if spoil:
            spoil(patch)
        found = Placement.on(torch.device("cuda", 0))
    partition._multiprocessors.cache_clear()

    assert found.parts == parts
