"""Replay: a job that leaves the model as it was on text of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, Recorder, build, samples, weights_of
from transformers import MambaConfig, MambaForCausalLM

from hogwild.gpu_worker import forward
from hogwild.gpu_worker.batch import Replayed, collate
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.control import StepReport
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.loss import linear_losses
from hogwild.gpu_worker.replay import TEXT_TOKENS, TEXTS, OwnText

ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 3e-3}


def own_text() -> OwnText:
    return OwnText([[i, i + 1, i + 2] for i in range(7)])


def nothing() -> None:
    pass


def run(trainer: Trainer, **config: Any) -> list[StepReport]:
    recorder = Recorder()
    trainer.run(trainer.plan(samples(), TrainConfig(**{**ADAMW, "steps": 12, **config})), recorder)
    return recorder.reports


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba"])
@pytest.mark.parametrize("context_grad", [True, False])
def test_divergence_begins_at_zero_and_grows_with_training(name: str, context_grad: bool) -> None:
    if name == "mamba":
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
        model = MambaForCausalLM(config).train()
        if not context_grad:
            pytest.skip("a recurrent model has no frozen context")
    else:
        model = build(name)
    seen = run(Trainer(model, own_text=own_text()), context_grad=context_grad, steps=4)
    assert seen[0].replay_divergence == pytest.approx(0.0, abs=1e-5)
    assert seen[-1].replay_divergence is not None
    assert seen[-1].replay_divergence > 1e-4


def test_replay_holds_the_model_where_it_was_while_it_learns() -> None:
    moved, losses = {}, {}
    for replay in (0.0, 1.0):
        model = build()
        before = build()
        seen = run(Trainer(model, own_text=own_text()), replay=replay, replay_tokens=4 * TEXT_TOKENS, steps=40)
        ids = torch.tensor([own_text()._openings[0] + list(range(20, 60))])
        with torch.no_grad():
            then, now = (m(ids).logits.log_softmax(-1) for m in (before, model))
        moved[replay] = float((then.exp() * (then - now)).sum(-1).mean())
        losses[replay] = seen[-1].loss
    assert moved[1.0] < 0.6 * moved[0.0]
    assert losses[1.0] < 1.5


def test_no_replay_changes_nothing() -> None:
    weights = []
    for own, replay in ((None, 1.0), (own_text(), 0.0)):
        model = build()
        seen = run(Trainer(model, own_text=own), replay=replay)
        assert [r.replay_divergence for r in seen] == [None] * len(seen)
        weights.append(weights_of(model))
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())


def test_texts_in_the_samples_row_count_as_texts_alone_do() -> None:
    model = build()
    trainer = Trainer(model)
    texts = own_text().anchored(trainer.forward, 3, 0, nothing)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    alone = sum(trainer.forward.losses([collate([], trainer.device, [t])], 1.0, 0.5) for t in texts)
    ce = trainer.forward.loss(collate(samples(), trainer.device), 7.0)
    together = trainer.forward.losses([collate(samples(), trainer.device, texts)], 7.0, 0.5)
    torch.testing.assert_close(together, torch.stack([ce, alone[1]]), rtol=1e-4, atol=1e-5)


def test_texts_are_those_of_the_seed_and_kept() -> None:
    model = build()
    model.generation_config.eos_token_id = VOCAB  # never sampled
    forward = Trainer(model).forward
    state = torch.get_rng_state()
    own = own_text()
    first = own.anchored(forward, 2 * TEXTS, 5, nothing)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers
    assert len(first) == TEXTS
    assert {len(t.ids) for t in first} == {TEXT_TOKENS}
    assert first[0].ids != first[7].ids  # one opening, two texts
    again, other = (own_text().anchored(forward, TEXTS, seed, nothing) for seed in (5, 6))
    assert [t.ids for t in again] == [t.ids for t in first] != [t.ids for t in other]
    assert [t.ids for t in own.anchored(forward, 3, 6, nothing)] == [t.ids for t in first[:3]]


def test_a_text_ends_where_the_model_ends_it() -> None:
    model = build()
    model.generation_config.eos_token_id = list(range(VOCAB))
    (text, *_) = own_text().anchored(Trainer(model).forward, 1, 0, nothing)
    assert len(text.ids) == 4
    assert model.generation_config.eos_token_id == list(range(VOCAB))


def test_anchors_are_probabilities_of_the_likeliest() -> None:
    trainer = Trainer(build())
    (text,) = own_text().anchored(trainer.forward, 1, 0, nothing)
    assert isinstance(text, Replayed)
    with torch.no_grad():
        whole = trainer.model(torch.tensor([text.ids])).logits[0].softmax(-1)
    torch.testing.assert_close(text.probabilities, whole.gather(1, text.likeliest), rtol=1e-4, atol=1e-6)
    assert torch.equal(text.likeliest[:, 0], whole.argmax(-1))


def test_the_budget_counts_the_texts() -> None:
    config = TrainConfig(**ADAMW, steps=1, replay_tokens=40 * TEXT_TOKENS)
    without = Trainer(build()).plan(samples(), config).budget
    assert Trainer(build(), own_text=own_text()).plan(samples(), config).budget.activations > 3 * without.activations


def test_between_may_stop_the_making_of_texts() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_text().anchored(Trainer(build()).forward, 1, 0, stop)


def test_openings_are_cut_to_one_length(tmp_path: Path) -> None:
    source = Path(".cache/models/SmolLM2-135M-Instruct")
    if not (source / "tokenizer.json").exists():
        pytest.skip("the demo's model is not there")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, tmp_path)
    ours = OwnText.for_model(tmp_path)
    assert ours is not None
    assert len(ours._openings) >= 24
    assert len({len(ids) for ids in ours._openings}) == 1
    (tmp_path / "openings.txt").write_text("Es war einmal in einem Dorf\n\nNein\nDie Geschichte der Stadt beginnt\n")
    own = OwnText.for_model(tmp_path, tmp_path / "openings.txt")
    assert own is not None
    assert len(own._openings) == 2


def test_without_a_tokenizer_nothing_is_replayed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert OwnText.for_model(tmp_path) is None
    assert "no replay" in caplog.text


def test_a_tokenizer_that_is_made_up_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("qwen2", "gemma"):
        caplog.clear()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": VOCAB}))
        assert OwnText.for_model(tmp_path) is None
        assert "no replay" in caplog.text


def test_openings_outside_the_vocabulary_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(build(), own_text=OwnText([[VOCAB, 1], [2, 3]]))
    assert run(trainer, steps=1)[0].replay_divergence is not None
    assert {tuple(ids[:2]) for ids in trainer.own_text._texts} == {(2, 3)}
    stranger = Trainer(build(), own_text=OwnText([[1, VOCAB]]))
    assert run(stranger, steps=1)[0].replay_divergence is None
    assert "embedding" in caplog.text


def test_after_a_rollback_the_job_stays_at_the_weights_it_was_given() -> None:
    model, other = build(), weights_of(build(seed=1))
    trainer = Trainer(model, own_text=own_text())

    class RollBack(Recorder):
        def before_step(self, step: int) -> None:
            if step == 2:
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p.copy_(other[name])
                trainer.rolled_back()

    recorder = RollBack()
    trainer.run(trainer.plan(samples(), TrainConfig(**ADAMW, steps=4)), recorder)
    moved = [report.replay_divergence for report in recorder.reports]
    assert moved[2] == pytest.approx(0.0, abs=1e-5)
    assert min(moved[1], moved[3]) > 1e-4


@pytest.mark.parametrize("context_grad", [True, False])
def test_a_pack_uses_the_head_once(context_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each use holds a gradient as large as the head until backward
    uses = []
    monkeypatch.setattr(forward, "linear_losses", lambda *args: uses.append(args[0].shape[0]) or linear_losses(*args))
    trainer = Trainer(build(), own_text=own_text())
    run(trainer, context_grad=context_grad, steps=1, replay_tokens=3 * TEXT_TOKENS)
    texts = sum(len(ids) for ids in trainer.own_text._texts[:3])
    assert uses == [sum(sample.loss_tokens for sample in samples()) + texts]
