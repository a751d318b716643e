"""Which architectures can be shared: tiny random models through vLLM's own loader, our hooks and the worker's attach.

    python tests/acceptance/architectures.py [--device cpu|cuda] [--only llama,gemma2] [--json FILE] [--table FILE]

For each model: transformers makes it, vLLM loads it in this process, another process attaches to it, builds the Hugging
Face model on the live memory and compares its logits with `from_pretrained`. Then, for every shared tensor, that one
changes the memory and this one asks the vLLM module for its output: if that stays, something else is served.
`--table` rewrites this device's part of docs/architectures.md.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# The usual shape: dimensions that vLLM's CPU attention takes (head size 32), a vocabulary that it has to pad.
USUAL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 250, "max_position_embeddings": 256, "head_dim": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**USUAL, "moe_intermediate_size": 64, "num_experts_per_tok": 2}

MODELS: dict[str, dict[str, Any]] = {
    "llama": USUAL,
    "llama (tied)": {**USUAL, "tie_word_embeddings": True},
    "mistral": USUAL,
    "qwen2": USUAL,
    "qwen3": USUAL,
    "gemma": {**USUAL, "num_key_value_heads": 1},
    "gemma2": {**USUAL, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {**USUAL, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "phi3": {**USUAL, "original_max_position_embeddings": 256},
    "phi": {**USUAL, "num_key_value_heads": 4},
    "olmo2": USUAL,
    "olmo3": {**USUAL, "sliding_window": 64},
    "granite": {**USUAL, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "starcoder2": USUAL,
    "gpt_neox": {**USUAL},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 250, "n_positions": 256,
             "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 250,
            "max_position_embeddings": 256, "word_embed_proj_dim": 128},
    "cohere": {**USUAL, "logit_scale": 0.0625},
    "stablelm": USUAL,
    "smollm3": USUAL,
    "glm4": {**USUAL, "attention_bias": True},
    "exaone4": {**USUAL, "sliding_window": 64},
    "deepseek_v3": {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
                    "topk_group": 1, "topk_method": "noaux_tc", "num_key_value_heads": 4, "q_lora_rank": 64,
                    "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
                    "head_dim": 32},
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "decoder_sparse_step": 1},
    "mixtral": {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**USUAL, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "gpt_oss": {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "qwen3_next": {**EXPERTS, "num_experts": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 64,
                   "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 250, "state_size": 16},
    "mamba2": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 250, "state_size": 16, "num_heads": 8,
               "head_dim": 32, "n_groups": 1},
    "falcon_h1": {**USUAL, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
}  # fmt: skip

# What doesn't train, by device: its result, and what the reason has to say. On a GPU as vLLM 0.26 does it.
TRAINS = ("trains", "")
EXPERTS_ON_CPU = ("refused by the plugin", "the model has experts")
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "cpu": {
        **dict.fromkeys(("deepseek_v3", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_next"), EXPERTS_ON_CPU),
        "mamba": ("refused by the worker", "A_log: derived: computed by exp"),
    },
    "cuda": {
        "phi": ("vLLM can't load it", "exceeds dimension size"),
        "gpt_neox": ("refused by the worker", "query_key_value.weight: derived: rearranged while loading"),
        "deepseek_v3": ("vLLM can't load it", "No valid MLA prefill backend"),
        "mamba": ("refused by the worker", "A_log: derived: cast from bfloat16 to float32"),
    },
}

TABLE_HEAD = (
    "| model type | result | shared | derived | unequal | ignored | logits against `from_pretrained` | why not |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def save_model(name: str, directory: Path, dtype: str) -> None:
    """A tiny random model of this kind as a checkpoint directory, the same on every run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(" ")[0], **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for parameter in model.parameters():  # no constants such as norms of ones: equal bits must mean the same tensor
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)


# --- the vLLM side ---------------------------------------------------------------------------------------------------


class Server:
    """vLLM's loader in this process. `load` goes the way of a vLLM worker up to the exported manifest."""

    def __init__(self, device: str) -> None:
        from vllm.model_executor.models import registry

        # vLLM looks at each model class in a process of its own, 12 s each the first time; here one process will do.
        registry._run_in_subprocess = lambda function: function()
        if device == "cpu":
            from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

            _set_torch_accelerator_to_noop()
        self.device = device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self.arguments: dict[str, Any] = {"moe_backend": "triton"} if device == "cuda" else {}
        self._ready = False

    def load(self, directory: Path, name: str) -> Any:
        """The loaded vLLM model; our plugin writes manifest or refusal as it does in a real server."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model_loader

        arguments = EngineArgs(
            model=str(directory), served_model_name=[name], dtype=self.dtype, enforce_eager=True, max_model_len=128,
            skip_tokenizer_init=True, **self.arguments,
        )  # fmt: skip
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not self._ready:
                store = Path(tempfile.mkdtemp()) / "store"
                backend = "gloo" if self.device == "cpu" else "nccl"
                init_distributed_environment(1, 0, f"file://{store}", 0, backend)
                self._ready = True
            destroy_model_parallel()
            initialize_model_parallel(1, 1)  # its groups depend on the model: experts have one of their own
            loader = get_model_loader(config.load_config)
            return loader.load_model(vllm_config=config, model_config=config.model_config)


def served_output(model: Any, parameter: str) -> Any:
    """What the vLLM module that holds this parameter answers to a fixed input, from the memory it really uses."""
    import torch

    path, _, key = parameter.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, key)
    generator = torch.Generator().manual_seed(1)
    method = getattr(module, "quant_method", None)
    weight = getattr(module, "weight", tensor)

    def inputs(width: int) -> Any:
        return torch.randn(3, width, generator=generator).to(device=weight.device, dtype=weight.dtype)

    with torch.no_grad(), contextlib.suppress(NotImplementedError, TypeError, AttributeError, RuntimeError):
        if method is not None and weight.dim() == 2 and hasattr(method, "apply"):
            if hasattr(method, "embedding") and not hasattr(module, "bias"):
                return method.embedding(module, torch.arange(weight.shape[0], device=weight.device))
            return method.apply(module, inputs(weight.shape[1]), getattr(module, "bias", None))
        if weight.dim() == 1 and method is None and not hasattr(module, "conv1d"):
            out = module(inputs(weight.shape[0]))
            return out[0] if isinstance(out, tuple) else out
    return tensor.detach().clone()


# --- the worker's side -----------------------------------------------------------------------------------------------


def settle(written: Any) -> None:
    """Wait until the device has written it: the other process looks as soon as it is told."""
    import torch

    if written.device.type == "cuda":
        torch.cuda.synchronize(written.device)


def worker(pipe: Connection) -> None:
    """Attaches on request, compares logits, changes memory: a process of its own, as the real worker is."""
    import torch
    from transformers import AutoModelForCausalLM

    from hogwild.errors import HogwildError
    from hogwild.gpu_worker.attach import attach
    from hogwild.gpu_worker.model import build_model

    torch.set_num_threads(1)
    attachment = model = None
    while True:
        request, argument = pipe.recv()
        try:
            if request == "attach":
                attachment = attach(Path(argument))
                verified = attachment.verify()
                answer: dict[str, Any] = {"verified": verified.tensors}
                try:
                    model = build_model(attachment)
                    reference = AutoModelForCausalLM.from_pretrained(
                        attachment.manifest.model_path, dtype=getattr(torch, attachment.manifest.dtype)
                    ).to(attachment.device)
                    ids = torch.arange(2, 34, device=attachment.device)[None]
                    with torch.no_grad():
                        difference = (model.eval()(ids).logits - reference.eval()(ids).logits).abs().max().item()
                    named = {p.data_ptr() for p in model.parameters() if p.requires_grad}
                    answer |= {
                        "difference": difference, "constants": sorted(model.hogwild_constants),
                        "trainable": len(named), "refused": None,
                        "forgotten": [n for n, v in attachment.views.items()
                                      if not any(n in s for s in model.hogwild_sources.values())],
                    }  # fmt: skip
                except HogwildError as error:
                    answer |= {"refused": error.message}
                pipe.send(answer)
            elif request == "perturb":
                view = attachment.views[argument]
                before = view.clone()
                view.add_(0.5)
                settle(view)
                pipe.send({})
                pipe.recv()
                view.copy_(before)
                settle(view)
                pipe.send({})
            elif request == "detach":
                model = None
                if attachment is not None:
                    attachment.close()
                attachment = None
                pipe.send({})
            else:
                return
        except Exception as error:
            pipe.send({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})


class Worker:
    """Handle of the other process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request: str, argument: str = "") -> dict[str, Any]:
        """One request, one answer."""
        self._pipe.send((request, argument))
        answer: dict[str, Any] = self._pipe.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.send(("end", ""))
        self._process.join(20)


# --- one model -------------------------------------------------------------------------------------------------------


def examine(name: str, server: Server, other: Worker, base: Path) -> dict[str, Any]:
    """Everything that is known of one model."""
    import torch

    from hogwild.config import slug
    from hogwild.manifest import Manifest, Refusal, manifest_path, refusal_path

    directory, runtime = base / slug(name), Path(os.environ["HOGWILD_RUNTIME_DIR"]) / slug(name)
    save_model(name, directory, server.dtype)
    try:
        model = server.load(directory, name)
    except Exception as error:
        return {"result": "vLLM can't load it", "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    refusal = Refusal.load(refusal_path(runtime))
    if refusal is not None:
        return {"result": "refused by the plugin", "why": "; ".join(text for _, text in refusal.reasons)}
    manifest = Manifest.load(manifest_path(runtime))
    row: dict[str, Any] = dict(Counter(record.status for record in manifest.tensors.values()))
    row["reasons"] = {n: f"{r.status}: {r.reason}" for n, r in manifest.tensors.items() if r.status != "shared"}
    answer = other.ask("attach", str(runtime))
    try:
        if "error" in answer:
            return {**row, "result": "failed", "why": answer["error"], "trace": answer["trace"]}
        row |= answer
        row["not_served"] = []
        for tensor, record in manifest.tensors.items():
            if record.status != "shared" or record.parameter is None:
                continue
            before = served_output(model, record.parameter)
            other.ask("perturb", tensor)
            after = served_output(model, record.parameter)
            other.ask("restore")
            if torch.equal(before, after) or not torch.equal(before, served_output(model, record.parameter)):
                row["not_served"].append(tensor)
    finally:
        other.ask("detach")
    row["why"] = grouped(row["reasons"])
    if answer["refused"]:
        row["why"] += " (a matrix of the model)"
    row["result"] = "refused by the worker" if answer["refused"] else "trains"
    return row


def wrong(device: str, name: str, row: dict[str, Any]) -> list[str]:
    """What of a model's row is not as it should be; the exit code and the tests go by it."""
    result, says = EXPECTED[device].get(name, TRAINS)
    found = []
    if row["result"] != result or says not in row["why"]:
        found.append(f"{row['result']} ({row['why']}) instead of {result} ({says})")
    if row.get("not_served"):
        found.append(f"not what the vLLM module reads: {', '.join(row['not_served'])}")
    if row["result"] == "trains":
        if row["difference"] != 0:  # the very logits of from_pretrained; not a number is none of them
            found.append(f"the logits differ by {row['difference']}")
        if row["forgotten"]:
            found.append(f"in no parameter of the Hugging Face model: {', '.join(row['forgotten'])}")
        if not row["verified"] == row["shared"] > 10:
            found.append(f"{row['verified']} of {row['shared']} shared tensors were verified")
    return found


def grouped(reasons: dict[str, str]) -> str:
    """Tensor → reason, told once for all layers."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike = re.sub(r"\d+", "*", name)
        if alike not in names.setdefault(reason, []):
            names[reason].append(alike)
    return "; ".join(f"{', '.join(alike)}: {reason}" for reason, alike in names.items())


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows of docs/architectures.md."""
    lines = []
    for name, row in results.items():
        counts = " | ".join(str(row.get(status, 0)) for status in ("shared", "derived", "unequal", "ignored"))
        difference = row.get("difference")
        logits = "–" if difference is None else "equal" if difference == 0 else f"differ by {difference:.1e}"
        lines.append(f"| {name} | {row['result']} | {counts} | {logits} | {row['why'].replace('*', chr(92) + '*')} |")
    return TABLE_HEAD + "\n".join(lines) + "\n"


def write_table(path: Path, device: str, text: str) -> None:
    """Replace this device's part of the page."""
    page = path.read_text()
    begin, end = f"<!-- {device} begin -->\n", f"<!-- {device} end -->"
    head, _, rest = page.partition(begin)
    path.write_text(head + begin + text + end + rest.partition(end)[2])


def main() -> int:
    """Examine and report; the exit code is 1 when a model is not as EXPECTED says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="comma-separated model types")
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--table", type=Path, help="rewrite this device's part of the page")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MODELS)
    base = Path(tempfile.mkdtemp(prefix="hogwild-architectures-"))
    os.environ.update(
        HOGWILD_RUNTIME_DIR=str(base / "runtime"), VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1",
        TOKENIZERS_PARALLELISM="false", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    other = Worker()
    results: dict[str, dict[str, Any]] = {}
    try:
        server = Server(arguments.device)
        for name in names:
            started = time.monotonic()
            try:
                row = examine(name, server, other, base)
            except Exception as error:
                row = {"result": "failed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            results[name] = row
            shown = {k: v for k, v in row.items() if k in ("result", "difference", "not_served", "forgotten", "why")}
            print(f"{name}: {shown} ({time.monotonic() - started:.1f} s)", flush=True)
            for problem in wrong(arguments.device, name, row):
                print(f"{name}: WRONG: {problem}", flush=True)
        other.close()
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.table:
        write_table(arguments.table, arguments.device, table(results))
    return int(any(wrong(arguments.device, name, row) for name, row in results.items()))


if __name__ == "__main__":
    sys.exit(main())
