"""torch.compile around the decoder layers. The compiler's own backend is left out: no C++ compiler is needed here."""

import functools
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_models import SMALL, build, samples
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from hogwild.errors import DoesNotFit
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer

LAYERS = 10  # more than the versions that torch.compile makes of one function before it gives up


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(SMALL, "num_hidden_layers", LAYERS)
    torch._dynamo.reset()
    counters.clear()


def losses(trainer: Trainer, **options: Any) -> list[float]:
    config = TrainConfig(optimizer="sgd", learning_rate=1e-2, max_tokens_per_step=30, **options)
    return trainer.run(trainer.plan(samples(6), config)).losses


def test_compiled_layers_train_as_the_others_do_and_share_their_graphs() -> None:
    plain, compiled = Trainer(build("gemma2")), Trainer(build("gemma2"), compile_layers=True)
    for options in ({}, {"context_grad": False}, {"trainable": ["*mlp*"]}):
        assert losses(compiled, **options) == pytest.approx(losses(plain, **options), rel=1e-4), options
        assert counters["stats"]["unique_graphs"] == 2, options  # with a mask and without; other ways run as they are
    assert compiled.recompute.compiles


def test_recomputed_layers_are_compiled_too() -> None:
    plain, compiled = Trainer(build()), Trainer(build(), compile_layers=True)
    for trainer in (plain, compiled):
        trainer.memory_limit = trainer.plan(samples(6), TrainConfig(optimizer="sgd")).budget.total - 20_000
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 4  # another two, made when the plan asks for them


def test_recomputation_that_cannot_be_compiled_is_planned_anew_without(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(build(), compile_layers=True)
    config = TrainConfig(optimizer="sgd")
    kept = trainer.plan(samples(6), config).budget
    assert kept.kept_layers == LAYERS
    passes = trainer._pass_short_rows

    def broken() -> None:
        if trainer.recompute.kept == 0:
            raise RuntimeError("no such kernel")
        passes()

    trainer._pass_short_rows = broken  # type: ignore[method-assign]
    trainer.memory_limit = kept.total - 20_000
    plan = trainer.plan(samples(6), config)
    assert not trainer.recompute.compiles and "no such kernel" in caplog.text
    assert plan.budget.kept_layers < LAYERS
    plain = Trainer(build())
    assert trainer.run(plan).losses == plain.run(plain.plan(samples(6), config)).losses


def test_a_recomputed_compiled_layer_does_not_make_its_output_a_second_time() -> None:
    trainer = Trainer(build(), compile_layers=True)
    trainer.profile()
    trainer._compile(keep=False)
    products = []
    for trainer.recompute.kept in (LAYERS, 0):
        with torch.profiler.profile() as found:
            trainer.forward.row(16).sum().backward()
        products.append(sum(e.count for e in found.key_averages() if e.key == "aten::mm"))
    assert products[1] - products[0] == 6 * LAYERS  # of seven


def test_a_model_that_cannot_be_compiled_is_trained_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def run(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no C compiler\nmany lines of it")

        return run

    expected = losses(Trainer(build()))
    monkeypatch.setattr(torch, "compile", broken)
    trainer = Trainer(build(), compile_layers=True)
    assert losses(trainer) == expected
    assert not trainer.recompute.compiles
    assert "training without it: no C compiler" in caplog.text and "many lines" not in caplog.text


def test_memory_that_runs_out_while_compiling_fails_the_job_and_the_next_one_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a compiler that finds no memory the first time; what it raises comes wrapped in an error of torch's
    short = [True]

    def backend(graph: Any, inputs: Any) -> Any:
        if short:
            short.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines")
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile.func, backend=backend))  # type: ignore[attr-defined]
    trainer = Trainer(build(), compile_layers=True)
    with pytest.raises(DoesNotFit, match=r"Compiling .* ran out of memory: .* 2\.00 GiB\. Now [\d,]+ MB are free") as e:
        losses(trainer)
    assert e.value.details["free"] > 0
    assert e.value.__context__ is None  # a traceback would keep the tensors alive
    assert "does not work" not in caplog.text
    # Then the next job's layers are compiled
    assert losses(trainer) == pytest.approx(losses(Trainer(build())), rel=1e-4)
    assert trainer.recompute.compiles
    assert counters["stats"]["unique_graphs"] >= 2


def test_the_plan_counts_all_gradients_of_a_compiled_layer() -> None:
    plain, compiled = Trainer(build()), Trainer(build(), compile_layers=True)
    compiled.profile()
    layer = sum(p.numel() * p.element_size() for p in compiled.recompute.layers[0].parameters())
    largest = sorted(p.numel() * p.element_size() for p in compiled.recompute.layers[0].parameters())[-2:]
    assert compiled._layer_gradients(compiled.params) == layer
    assert plain._layer_gradients(plain.params) == sum(largest)
    frozen = {n: p for n, p in compiled.params.items() if n.startswith("model.layers.3.mlp")}
    assert compiled._layer_gradients(frozen) == sum(p.numel() * p.element_size() for p in frozen.values())
