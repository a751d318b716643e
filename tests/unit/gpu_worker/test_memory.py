"""The budget made before a job: measured activations, a refusal with numbers, smaller packs, fewer kept layers."""

import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from hogwild.config import Settings
from hogwild.errors import DoesNotFit
from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.memory import Budget, Load, Profile, RowKind, budget, free_bytes
from hogwild.gpu_worker.optim import base
from hogwild.gpu_worker.recompute import ActivationMeter, Recompute
from hogwild.tasks.saving import Saver

LAYERS, WIDTH = 6, 64


def build() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        )
    ).train()  # fmt: skip


def rows(n: int, tokens: int) -> list[Sample]:
    return [Sample([i % 100 + 1] * (tokens - 1), [3, 4]) for i in range(n)]


def make(free: int, tokens: int = 1000) -> Budget:
    profile = Profile(layer=1000.0, elsewhere=100.0, boundary=50.0, cache=10.0, layers=10)
    params = {"w": torch.empty(100, 100)}
    return budget(
        profile, Load(tokens, predictors=10), params=params, tokens=set(), head=torch.empty(200, 50),
        whole_logits=False, layer_gradients=40_000, optimizer_bytes=5000, accumulates=False, free=free,
    )  # fmt: skip


def test_layers_keep_their_activations_as_far_as_memory_goes() -> None:
    tight, roomy = make(free=0), make(free=1 << 40)
    assert (tight.kept_layers, tight.fits) == (0, False)
    assert (roomy.kept_layers, roomy.fits) == (10, True)
    least = tight.total
    budgets = [make(free=least + extra * 1_045_000 + 1000) for extra in range(11)]
    assert all(b.fits for b in budgets)
    assert [b.kept_layers for b in budgets] == list(range(11))
    assert make(free=least - 1).fits is False


def test_gradients_of_embedding_and_head_are_counted_when_they_exist() -> None:
    profile = Profile(layer=10.0, elsewhere=1.0, boundary=1.0, cache=0.0, layers=10)
    embed, head, layer = torch.empty(10_000, 50), torch.empty(10_000, 50), torch.empty(100, 100)

    def need(names: set[str], **params: torch.Tensor) -> Budget:
        return budget(
            profile, Load(10, predictors=1), params={"w": layer, **params}, tokens=names, head=head, whole_logits=False,
            layer_gradients=40_000, optimizer_bytes=0, accumulates=False, free=1 << 40,
        )  # fmt: skip

    apart, tied = need({"e", "h"}, e=embed, h=head), need({"h"}, h=head)
    assert apart.working == tied.working - head.nbytes < 50_000  # the head's is gone before the layers, unless tied
    assert (apart.embedding, tied.embedding) == (2 * embed.nbytes, 3 * head.nbytes)
    assert need({"e", "h"}).embedding == 0
    assert 2 * embed.nbytes < apart.total < 3 * embed.nbytes + (64 << 20)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("kind", "lengths"), [
    ("one", [(700, 0)]), ("packed", [(700, 0)]), ("frozen", [(600, 100), (20, 900), (300, 300)])])  # fmt: skip
def test_profile_matches_what_autograd_keeps(
    kind: RowKind, lengths: list[tuple[int, int]], compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the profile from short rows
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    trainer = Trainer(build(), compile_layers=compiles)
    profile = trainer.profile(kind, eager=kind == "frozen")
    assert (profile.layers, profile.boundary) == (LAYERS, WIDTH * 4)
    for tokens, context in lengths:
        # Then it foretells the bytes of far longer ones, of kept and of checkpointed layers
        run = functools.partial(trainer.forward.row, tokens, context, samples=2 if kind == "packed" else 1)
        of_layer = tokens * profile.layer + context * profile.context + tokens * (tokens + context) * profile.pair
        with ActivationMeter(trainer.model, trainer.recompute.layers) as meter:
            run()
        assert sum(meter.by_layer) == pytest.approx(LAYERS * of_layer, rel=0.05)
        trainer.recompute.kept = 2
        with ActivationMeter(trainer.model, trainer.recompute.layers) as meter:
            run()
        trainer.recompute.kept = LAYERS
        shared = tokens * (tokens + context)  # the mask that all layers are given
        assert 0.9 * 2 * of_layer < sum(meter.by_layer) < 2 * of_layer + tokens * 4 * 1.5 * profile.boundary + shared


def test_nothing_of_a_model_is_left_when_its_trainer_is_closed() -> None:
    # Given a model whose layers save what they put out (softmax, sigmoid), and whose trainer measured and trained it
    model = build()
    trainer = Trainer(model)
    for context_grad in (True, False):
        config = TrainConfig(optimizer="sgd", learning_rate=1e-3, steps=1, context_grad=context_grad)
        trainer.run(trainer.plan(rows(2, 20), config))
    parameters = [weakref.ref(p) for p in model.parameters()]
    trainer.close()
    del trainer, model
    gc.collect()
    assert not [p for p in parameters if p() is not None]


def test_job_that_cannot_fit_is_refused_with_the_numbers() -> None:
    trainer = Trainer(build(), memory_limit=65 << 20)
    with pytest.raises(DoesNotFit, match="MB are free") as e:
        trainer.plan(rows(2, 3000), TrainConfig(optimizer="apollo-mini"))
    details = e.value.details
    assert details["total"] > details["free"] == 65 << 20
    assert details["activations"] > 0
    assert details["working"] > 0
    assert details["head"] > 0


def short_of_memory() -> Trainer:
    """With memory for one sample of 300 tokens at a time."""
    model = build()
    one = Trainer(model).plan(rows(1, 300), TrainConfig(epochs=1)).budget
    least = one.total - int(1.1 * (one.activations - 300 * LAYERS * WIDTH * 4))
    return Trainer(model, memory_limit=int(least * 1.02) + (1 << 20))


def test_memory_that_runs_out_while_measuring_refuses_the_job_with_numbers_and_not_the_next() -> None:
    trainer = Trainer(build(), memory_limit=1 << 30)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines")

    handle = trainer.model.model.layers[3].mlp.register_forward_hook(fail)
    with pytest.raises(DoesNotFit, match=r"Measuring .* ran out of memory: .*2\.00 GiB\. Now 1,074 MB are free") as e:
        trainer.plan(rows(2, 30), TrainConfig(steps=1))
    handle.remove()
    assert e.value.details == {"free": 1 << 30}
    assert e.value.__context__ is None  # a traceback would keep the tensors alive
    assert trainer.run(trainer.plan(rows(2, 30), TrainConfig(steps=1))).n_steps == 1


def test_saved_state_that_does_not_fit_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given saved state, and a device that has no room for it
    settings = Settings(served_model_name="m", data_dir=tmp_path)
    path, config = tmp_path / "optimizer" / "m@7.safetensors", TrainConfig(optimizer="adamw", steps=1)
    trainer = Trainer(build())
    trainer.run(trainer.plan(rows(1, 10), config))
    trainer.save_optimizer(path)
    saved, trainer.optimizer = trainer.optimizer, None
    assert saved is not None

    class Full:
        def __init__(self, *_: Any) -> None:
            self.real = safe_open(path, "pt")

        def __enter__(self) -> Any:
            return mock.Mock(wraps=self.real, get_tensor=mock.Mock(side_effect=torch.OutOfMemoryError("CUDA: full.")))

        def __exit__(self, *_: object) -> None:
            pass

    nothing: Any = None
    store: Any = mock.Mock(generations=lambda: [])
    saver = Saver(settings, store=store, dirty=nothing, operations=nothing, registry=nothing)
    with monkeypatch.context() as patch:
        patch.setattr(base, "safe_open", Full)
        with pytest.raises(DoesNotFit, match=r"Loading .* MB\) ran out of memory: CUDA: full") as e:
            saver.load_optimizer(trainer, config, 7)
    # Then the job that wanted it fails with the numbers, and a later one takes it up
    assert e.value.details["optimizer"] == saved.allocated_bytes()
    assert e.value.details["free"] > 0
    assert e.value.__context__ is None
    assert trainer.optimizer is None
    saver.load_optimizer(trainer, config, 7)
    assert trainer.optimizer is not None
    assert trainer.optimizer.steps == 1


def test_packs_shrink_until_they_fit_and_a_resumed_job_keeps_their_size() -> None:
    # Given a pack size of 4096 asked for
    trainer = short_of_memory()
    plan = trainer.plan(rows(12, 300), TrainConfig(epochs=1))
    assert plan.pack_tokens < 4096
    assert plan.n_steps > 1
    assert plan.budget.fits
    # Then with all the memory of another day it is laid out as it was
    trainer.memory_limit = None
    assert trainer.plan(rows(12, 300), TrainConfig(epochs=1)).n_steps == 1
    assert trainer.plan(rows(12, 300), TrainConfig(epochs=1), pack_tokens=plan.pack_tokens).steps == plan.steps


def test_a_job_of_so_many_steps_trains_all_its_tokens_in_smaller_packs() -> None:
    # Given jobs that would be one step of eight samples, and two of them with a warm-up
    trainer = short_of_memory()
    data = rows(8, 300)
    one, two = TrainConfig(steps=1), TrainConfig(steps=2, warmup_steps=1, gradient_accumulation=2, optimizer="sgd")
    short = [trainer.plan(data, config) for config in (one, two)]
    trainer.memory_limit = None
    whole = [trainer.plan(data, config) for config in (one, two)]
    assert [(p.n_steps, p.asked_steps) for p in whole] == [(1, 1), (2, 2)]
    assert whole[1].config == two.for_width(WIDTH)
    # Then in smaller packs none is left out: there are more steps, and the warm-up is as long a part of them
    assert all(sorted({i for s in p.steps for pack in s for i in pack}) == list(range(8)) for p in short)
    assert [p.tokens for p in short] == [p.tokens for p in whole]
    assert all(p.pack_tokens < p.asked_tokens == 4096 and p.n_steps > p.asked_steps for p in short)
    assert short[1].config.warmup_steps == short[1].n_steps // 2
    # and resumed with more memory the plans are the same
    again = [trainer.plan(data, c, pack_tokens=p.pack_tokens) for p, c in zip(short, (one, two), strict=True)]
    assert [(p.steps, p.config) for p in again] == [(p.steps, p.config) for p in short]
    # and the longest warm-up that may be asked for becomes no longer than that
    longest = trainer.plan(data, TrainConfig(steps=2, warmup_steps=1_000_000), pack_tokens=short[0].pack_tokens)
    assert longest.n_steps > 2
    assert longest.config.warmup_steps == 1_000_000


def test_state_that_is_already_there_is_not_counted_again() -> None:
    trainer = Trainer(build())
    config = TrainConfig(optimizer="adamw", steps=1)
    first = trainer.plan(rows(1, 10), config)
    assert first.budget.optimizer >= 8 * sum(p.numel() for p in trainer.params.values())
    trainer.run(first)
    assert trainer.plan(rows(1, 10), config).budget.optimizer == 0


def test_a_plan_accounts_for_its_memory() -> None:
    # Given a job whose optimizer state is there already, on a device with room for some layers' activations
    trainer, config = Trainer(build()), TrainConfig(optimizer="adamw", steps=3)
    trainer.run(trainer.plan(rows(1, 10), config))
    trainer.memory_limit = trainer.plan(rows(4, 300), config).budget.total - (1 << 20)
    plan = trainer.plan(rows(4, 300), config)
    account = json.loads(json.dumps(plan.account()))
    # Then the account has all of the budget, and the state in full
    memory = account["memory"]
    assert memory["optimizer"] == 0
    assert trainer.optimizer is not None
    assert account["optimizer_state"] == trainer.optimizer.allocated_bytes()
    assert 0 < account["kept_layers"] < account["layers"] == LAYERS
    assert (account["pack_tokens"], account["asked_pack_tokens"], account["asked_steps"]) == (4096, 4096, 3)
    assert memory["free"] == trainer.memory_limit >= memory["total"] > memory["activations"] + memory["working"] > 0
    # and the log's line says it in MB
    assert f"{account['kept_layers']} of {LAYERS} layers" in str(plan)
    assert f"activations {memory['activations'] / 1e6:,.0f} MB" in str(plan)
    assert f"{memory['free'] / 1e6:,.0f} MB are free" in str(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_is_charged_with_all_gradients_in_float32(dtype: torch.dtype) -> None:
    trainer = Trainer(build().to(dtype))
    need = trainer.plan(rows(4, 10), TrainConfig(gradient_accumulation=2)).budget
    assert need.gradients == sum(4 * p.numel() for p in trainer.params.values())


def test_limit_is_an_upper_bound_on_free_memory() -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu, 1000) == 1000
    assert free_bytes(cpu, None) > 1000


def test_recompute_gives_the_layers_their_forward_back() -> None:
    model = build()
    original = model.model.layers[0].forward
    wrapped = Recompute(model.model.layers)
    assert "forward" in model.model.layers[0].__dict__
    wrapped.close()
    assert model.model.layers[0].forward == original
