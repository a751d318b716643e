"""A real (tiny) transformers model is trained, synced, loaded with from_pretrained, and rolled back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hogwild.checkpoint.store import CheckpointStore

TOKENS = torch.arange(24).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def train(model: torch.nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_trained_synced_loaded_and_rolled_back(tmp_path, io, tied, shard_size):
    # Given a served model and its directory, with one file or several, with a head of its own or tied
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    directory = tmp_path / "checkpoint"
    with CheckpointStore.open(directory, source=tmp_path / "model", io=io) as store:
        # the tied head is in no file, and not among the views
        views = {name: parameter.data for name, parameter in model.named_parameters()}
        assert set(views) == set(store.layout.by_name)
        assert (len(store.layout.files) > 1) == (shard_size == "100KB")
        seen = {0: logits(model)}
        for version in (1, 2):
            train(model, 2)
            seen[version] = logits(model)
            store.sync(views, weight_version=version)
            # Then what is loaded from disk answers as the live model does, bit for bit
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), seen[version])
        # When rolled back, live model and disk answer as they did
        store.rollback(1, views, weight_version=3)
        assert torch.equal(logits(model), seen[1])
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), seen[1])
        store.export(tmp_path / "first", 0)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "first")), seen[0])
