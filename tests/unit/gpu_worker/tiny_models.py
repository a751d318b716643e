"""Tiny models of several architectures, and samples for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.control import StepReport, Unattended

VOCAB = 101
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# Each differs from Llama in something that the engine must not break: biases, q/k norms, soft-capped logits and sliding
# windows, scaled logits, fused experts.
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
}
# They keep something else than keys and values: states, states beside keys and values, an indexer's keys beside them.
NOT_ONLY_KEYS_AND_VALUES: dict[str, Any] = {
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=8,
                     n_groups=1, chunk_size=8)
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
    ),
    "glm_moe_dsa": lambda: GlmMoeDsaForCausalLM(
        GlmMoeDsaConfig(**{**SMALL, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
                        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                        v_head_dim=16, index_topk=8, index_head_dim=16, index_n_heads=2)
    ),
}  # fmt: skip


def build(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    model = (ARCHITECTURES | NOT_ONLY_KEYS_AND_VALUES)[name]().to(dtype)
    # Larger than transformers initialises: attention must be sharp for a leak between samples to show.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.train()


def samples(n: int = 5, seed: int = 0, weighted: bool = False) -> list[Sample]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        context = torch.randint(0, VOCAB, (4 + 3 * i,), generator=g).tolist()
        continuation = torch.randint(0, VOCAB, (3 + i % 3,), generator=g).tolist()
        weights = torch.rand(len(continuation), generator=g).tolist() if weighted else None
        out.append(Sample(context, continuation, weights))
    return out


def weights_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Recorder(Unattended):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.reports.append(report)
