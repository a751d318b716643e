"""Write a Hugging Face model directory with random weights in a known shape: what GPU benchmarks serve and train.

    python bench/random_model.py qwen3-8b DIRECTORY [--tokenizer DIR] [--device cuda]

Speed does not depend on what the weights say. The tokenizer is copied from a real model, because vLLM wants one; its
vocabulary is smaller than the shape's, which vLLM accepts.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-8B's config.json
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 49152, "tie_word_embeddings": False},
}  # fmt: skip
SHARD_BYTES = 4 << 30


def config(shape: str, dtype: str) -> dict[str, Any]:
    """config.json of a shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "max_position_embeddings": 40960, "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "use_cache": True, "dtype": dtype, "bos_token_id": 1, "eos_token_id": 2,
        **SHAPES[shape],
    }  # fmt: skip


def make(shape: str, target: Path, *, tokenizer: Path | None = None, dtype: str = "bfloat16", device: str = "cpu",
         seed: int = 0) -> Path:  # fmt: skip
    """Write the model; weights N(0, 0.02), norms 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config(shape, dtype), indent=2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, dims in shapes.items():
        tensor = torch.empty(dims, dtype=getattr(torch, dtype), device=device)
        if len(dims) == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            _write(target, shards)
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    _write(target, shards)
    files = sorted(target.glob("part-*.safetensors"))
    index: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, "pt") as opened:
            index |= dict.fromkeys(opened.keys(), name)
        file.rename(target / name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if tokenizer is not None:
        for file in (*tokenizer.glob("tokenizer*"), *tokenizer.glob("chat_template*")):
            shutil.copy(file, target)
    return target


def _write(target: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Write the last shard and begin the next."""
    save_file({k: v.cpu() for k, v in shards[-1].items()}, target / f"part-{len(shards):05d}.safetensors")
    shards[-1] = {}
    shards.append({})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(make(options.shape, options.directory, tokenizer=options.tokenizer, dtype=options.dtype,
               device=options.device))  # fmt: skip
