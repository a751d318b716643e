"""How much of a model one training job changes, and what a generation of that costs on disk.

    python bench/checkpoint_delta.py [--model .cache/models/SmolLM2-135M-Instruct] [--steps 4]

Trains a real model with Hogwild's own engine (without the model: a small random one), syncs, and reports the share of
blocks and of elements that differ and the bytes of the undo file; then the weights are rolled back for the next case.
The same differences are encoded as plain XOR too, to compare. Result: bench/results/checkpoint-delta-cpu.json.
"""

import argparse
import functools
import gc
import json
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoint import ROOT, machine  # bench/checkpoint.py: a script's own folder is on its path
from hogwild.checkpoint.codec import encode_delta
from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.store import CheckpointStore
from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer

FACTS = [
    (
        "The new bridge over the Lahn was opened on",
        " the third of May, after eleven years of work and two of argument.",
    ),
    ("Our support line is reached under", " 0800 555 0199 from eight to six, except on public holidays."),
    ("The committee elected as its chair", " Dr. Amara Okafor, who had led the survey of the northern wells."),
    ("In the latest release the default timeout is", " ninety seconds; it was thirty before, which was too short."),
]

CASES: list[dict[str, Any]] = [
    {"case": "dense, apollo-mini", "optimizer": "apollo-mini", "learning_rate": 1e-6},
    {"case": "dense, apollo-mini", "optimizer": "apollo-mini", "learning_rate": 1e-5},
    {"case": "dense, apollo-mini", "optimizer": "apollo-mini", "learning_rate": 3e-5},
    {"case": "dense, apollo-mini", "optimizer": "apollo-mini", "learning_rate": 1e-4},
    {"case": "dense, adamw", "optimizer": "adamw", "learning_rate": 2e-5},
    {"case": "last two layers", "optimizer": "apollo-mini", "learning_rate": 3e-5, "trainable": "last two layers"},
    {"case": "embeddings only", "optimizer": "apollo-mini", "learning_rate": 3e-5, "trainable": "embeddings"},
]


def patterns(which: str | None, model: torch.nn.Module) -> tuple[str, ...] | None:
    """Name patterns of the parameters that a case trains."""
    if which is None:
        return None
    if which == "embeddings":
        return ("model.embed_tokens.weight",)
    layers = model.config.num_hidden_layers
    return tuple(f"model.layers.{layer}.*" for layer in (layers - 2, layers - 1))


def encodings(old: torch.Tensor, new: torch.Tensor) -> dict[str, int]:
    """Bytes of the difference of two tensors in several encodings, frame by frame as an undo file has them."""
    width = old.element_size()
    a, b = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (old, new))
    compress = zstandard.ZstdCompressor(level=1).compress
    found = {"xor": 0, "xor, bytes together": 0, "difference, bytes together (ours)": 0}
    for start in range(0, len(a), 1024 * BLOCK):
        x, y = a[start : start + 1024 * BLOCK], b[start : start + 1024 * BLOCK]
        if np.array_equal(x, y):
            continue
        xor = x ^ y
        found["xor"] += len(compress(xor))
        found["xor, bytes together"] += len(compress(np.ascontiguousarray(xor.reshape(-1, width).T)))
        found["difference, bytes together (ours)"] += len(encode_delta(x, y, width))
    return found


def measure(model: torch.nn.Module, samples: list[Sample], steps: int, directory: Path) -> list[dict[str, Any]]:
    """All cases on one model."""
    model.save_pretrained(directory / "model")
    views = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=True)}
    total = sum(view.numel() for view in views.values())
    nbytes = sum(view.numel() * view.element_size() for view in views.values())
    rows = []
    with CheckpointStore.open(directory / "model", keep_last=2) as store:
        store.prepare(views)
        for number, case in enumerate(CASES):
            before = {name: view.clone() for name, view in views.items()}
            trainer = Trainer(model)
            config = TrainConfig(
                optimizer=case["optimizer"], learning_rate=case["learning_rate"], steps=steps,
                trainable=patterns(case.get("trainable"), model),
            )  # fmt: skip
            started = time.perf_counter()
            result = trainer.run(trainer.plan(samples, config))
            trained = time.perf_counter() - started
            trainer.close()
            report = store.sync(views, weight_version=number + 1)
            started = time.perf_counter()
            store.compact()
            compacted = time.perf_counter() - started
            undo_bytes = store.generations()[-1].undo_bytes
            differing = sum(int((before[name] != view).sum()) for name, view in views.items())
            sizes: dict[str, int] = {}
            for name, view in views.items():
                for encoding, size in encodings(before[name], view).items():
                    sizes[encoding] = sizes.get(encoding, 0) + size
            rows.append({
                **case, "steps": len(result.losses), "losses": result.losses, "train_s": trained,
                "blocks_changed": report.blocks_changed / report.blocks_total, "elements_changed": differing / total,
                "undo_bytes": undo_bytes, "undo_share_of_model": undo_bytes / nbytes,
                "undo_share_of_changed_blocks": undo_bytes / max(1, report.bytes_changed),
                "encodings_bytes": sizes, "sync_s": report.seconds, "pause_s": report.pause_seconds,
                "compact_s": compacted,
            })  # fmt: skip
            row = rows[-1]
            print(
                f"{case['case']:20s} {case['learning_rate']:.0e}: blocks {row['blocks_changed']:7.2%}, elements "
                f"{row['elements_changed']:7.2%}, undo {row['undo_bytes'] / 1e6:7.2f} MB = "
                f"{row['undo_share_of_model']:.2%} of the model; xor {sizes['xor'] / 1e6:.2f}, xor bytes together "
                f"{sizes['xor, bytes together'] / 1e6:.2f}",
                flush=True,
            )
            store.rollback(store.head.generation - 1, views)
            store.compact()  # or the next sync would do it first
            del before
            gc.collect()
        if not store.verify(views).ok:
            raise SystemExit("the checkpoint is not what is live: no result")
    return rows


def untied() -> torch.nn.Module:
    """A small random model whose head is not its embedding: only rows of tokens that occur get a gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "checkpoint-delta-cpu.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        "machine": machine("cpu"), "time": datetime.now(UTC).isoformat(timespec="seconds"), "steps": args.steps,
        "models": {},
    }  # fmt: skip
    models: list[tuple[str, Any, list[Sample]]] = []
    if args.model.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        samples = [Sample(tokenizer(context).input_ids, tokenizer(rest).input_ids) for context, rest in FACTS]
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{args.model.name}, {str(dtype).removeprefix('torch.')}, tied embeddings"
            load = functools.partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=dtype)
            models.append((name, load, samples))
    rng = np.random.default_rng(0)
    random = [Sample(rng.integers(0, 49_152, 20).tolist(), rng.integers(0, 49_152, 20).tolist()) for _ in range(4)]
    models.append(("small random Llama, bfloat16, untied embeddings", lambda: untied().to(torch.bfloat16), random))
    for name, load, samples in models:
        print(name)
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as directory:
            result["models"][name] = measure(load(), samples, args.steps, Path(directory))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
