"""Yield points inside a real training step: every layer, forward and backward, and nothing left behind."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hogwild.gpu_worker.governor import Governor, GovernorConfig, NoQueue
from hogwild.gpu_worker.pulse import Reading
from hogwild.gpu_worker.yield_points import AHEAD, CudaQueue, device_queue, install_yield_points, layers_of


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):  # (batch, width)
        return x + torch.tanh(self.linear(x))


class Model(torch.nn.Module):
    def __init__(self, layers: int = 4, width: int = 16, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(width, width)
        self.small = torch.nn.ModuleList(torch.nn.Identity() for _ in range(20))  # longer, but nothing to yield between
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def yield_point(self, *_) -> None:
        self.calls += 1


def test_the_layers_are_found():
    model = Model()

    assert layers_of(model) == list(model.layers)
    assert layers_of(torch.nn.Linear(2, 2)) == []


def test_layers_of_a_transformer():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                         num_attention_heads=2, num_key_value_heads=2))

    assert layers_of(model) == list(model.model.layers)


@pytest.mark.parametrize(("checkpointed", "per_layer"), [(False, 2), (True, 3)])  # forward, backward; recomputation
def test_every_layer_yields_forward_and_backward(checkpointed, per_layer):
    model, governor = Model(checkpointed=checkpointed), Counting()
    remove = install_yield_points(model, governor)

    model(torch.randn(2, 16)).sum().backward()
    assert governor.calls == per_layer * 4
    remove()
    model(torch.randn(2, 16)).sum().backward()

    assert governor.calls == per_layer * 4


def test_layers_of_which_a_part_is_trained_yield_backward_too():
    model, governor = Model(), Counting()
    install_yield_points(model, governor)
    for block in model.layers:
        block.linear.weight.requires_grad_(False)  # the first parameter: what a job does that trains only the biases

    model(torch.randn(2, 16)).sum().backward()

    assert governor.calls == 2 * 4


def test_frozen_layers_yield_forward():
    model, governor = Model(), Counting()
    for p in model.layers.parameters():
        p.requires_grad_(False)
    install_yield_points(model, governor)

    model(torch.randn(2, 16)).sum().backward()

    assert governor.calls == 4


def test_yielding_does_not_change_what_is_learned():
    torch.manual_seed(0)
    plain, paced = Model(), Model()
    paced.load_state_dict(plain.state_dict())
    busy = [Reading(at=0.0, tokens=0, itl_sum_s=0.0, running=1, waiting=0, updated=0.0)]
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    class Vllm:
        def latest(self):
            return Reading(**{**vars(busy[0]), "at": clock[0], "updated": clock[0]})

        def close(self):
            pass

    governor = Governor(GovernorConfig(itl_budget_ms=5), Vllm(), clock=lambda: clock[0], sleep=sleep)
    install_yield_points(paced, governor)
    x = torch.randn(2, 16)
    for model in (plain, paced):
        model(x).pow(2).sum().backward()

    assert governor.yielded_s > 0
    for a, b in zip(plain.parameters(), paced.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_yield_point_with_nothing_to_do_costs_under_20_microseconds():
    class Quiet:
        def latest(self):
            return Reading(at=time.monotonic(), tokens=0, itl_sum_s=0.0, running=0, waiting=0)

        def close(self):
            pass

    governor = Governor(GovernorConfig(itl_budget_ms=5), Quiet())
    costs = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            governor.yield_point()
        costs.append((time.perf_counter() - start) / 100)

    assert min(costs) < 20e-6


def test_the_cpu_has_no_queue():
    assert isinstance(device_queue(torch.device("cpu")), NoQueue)


def test_a_cuda_queue_is_kept_short_and_drained(monkeypatch):
    """The bookkeeping, with events that only take notes; the real ones are in tests/gpu."""
    waited, made = [], []

    class Event:
        def __init__(self, blocking):
            assert blocking  # a spinning wait would take a core from vLLM
            made.append(self)

        def record(self, stream):
            assert stream == "stream"

        def synchronize(self):
            waited.append(self)

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event))
    queue = CudaQueue("stream")

    for _ in range(AHEAD):
        queue.bound()
    assert waited == []
    for _ in range(10):
        queue.bound()
    assert len(waited) == 10 and len(made) == AHEAD + 1  # events are used again
    queue.drain()
    assert len(waited) == 10 + AHEAD + 1
    queue.drain()
    assert len(waited) == 10 + AHEAD + 2
