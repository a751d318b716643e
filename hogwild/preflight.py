"""What keeps a model's weights from being shared, by name, with what to do about it.

One list, used twice: `hogwild doctor` asks before anything starts, the plugin asks inside vLLM with what vLLM really
decided. A check gets `Facts` and returns a `Problem` or None; a fact that is not known is left at its default and its
check passes. Needs neither torch nor vLLM.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogwild.errors import ConfigError

SUPPORTED_VLLM = "0.26 to 0.33"
SAME_NAME = "same-name"  # the one check whose answer is not the model's or the settings': asked by the plugin alone

# Fields of a config.json that hold the number of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why sharing is refused: `check` is its short name, `message` says what is wrong and what to do."""

    check: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How vLLM is set up, as far as it is known."""

    device: str = "cuda"  # cuda, cpu, or another of vLLM's platforms
    quantization: str | None = None
    sleep_mode: bool = False
    cumem_allocator: bool = False
    load_format: str = "auto"
    default_loader: bool = True  # vLLM's DefaultModelLoader reads the checkpoint
    checkpoint_dtype: str | None = None
    serving_dtype: str | None = None
    checkpoint_files: tuple[str, ...] | None = None  # names in the model's directory
    moe: bool = False
    moe_backend: str | None = None
    allocator_config: str = ""  # PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF
    freezing: bool = False
    config_override: str | None = None  # vLLM's argument that makes another model of config.json
    cpu_offload_gb: float = 0.0
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    eplb: bool = False
    expert_parallel: bool = False
    remote_weights: str | None = None  # a model that vLLM streams from an object store


def quantised(facts: Facts) -> str | None:
    """Quantised weights are not the values that training moves."""
    if facts.quantization in (None, "", "none"):
        return None
    return (
        f"the weights are quantised ({facts.quantization}), and integer and 8-bit weights can't take gradient steps: "
        f"serve the unquantised checkpoint"
    )


def sleep_mode(facts: Facts) -> str | None:
    """The cumem allocator's memory has no IPC handle, and sleeping takes the weights away."""
    if facts.sleep_mode:
        return "sleep mode is on: start vLLM without --enable-sleep-mode (its allocator's memory can't be shared)"
    if facts.cumem_allocator:
        return "the cumem allocator is on, and its memory can't be shared: start vLLM without --enable-cumem-allocator"
    return None


def expandable_segments(facts: Facts) -> str | None:
    """cudaIpcGetMemHandle refuses memory made of virtual address ranges."""
    if facts.device != "cuda" or "expandable_segments:true" not in facts.allocator_config.lower().replace(" ", ""):
        return None
    return "expandable segments are on: take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF for vLLM"


def freezing(facts: Facts) -> str | None:
    """Inductor's freezing turns weights into constants of the compiled graph."""
    if not facts.freezing:
        return None
    return (
        "inductor freezing copies the weights into the compiled code: unset TORCHINDUCTOR_FREEZING, and leave freezing "
        "and (on a CPU) max_autotune out of --compilation-config's inductor_compile_config"
    )


def options_freeze(options: Mapping[str, Any], device: str) -> bool:
    """Whether vLLM's `inductor_compile_config` switches freezing on; for max_autotune, its CPU runner does."""
    return bool(options.get("freezing")) or (device == "cpu" and bool(options.get("max_autotune")))


def permuting_moe_backend(facts: Facts) -> str | None:
    """FlashInfer and other packed layouts permute expert weights after loading."""
    backend = (facts.moe_backend or "auto").lower()
    if not facts.moe or facts.device != "cuda" or backend in ("auto", "triton"):
        return None
    return f"the MoE backend {backend} permutes expert weights after loading: start vLLM with --moe-backend triton"


def moe_on_cpu(facts: Facts) -> str | None:
    """vLLM's CPU kernels for experts only work on packed weights."""
    if not facts.moe or facts.device != "cpu":
        return None
    return "the model has experts, and vLLM's CPU kernels keep a packed copy of those: serve it on a GPU to train it"


def loader(facts: Facts) -> str | None:
    """The map is learned by watching vLLM's default loader."""
    if facts.remote_weights:
        return f"the weights come from {facts.remote_weights}: serve a local checkpoint directory"
    if facts.load_format == "dummy":
        return "the weights are random (--load-format dummy): there is no checkpoint to train"
    if not facts.default_loader:
        return f"--load-format {facts.load_format} bypasses vLLM's default loader: use auto or safetensors"
    return None


def no_safetensors(facts: Facts) -> str | None:
    """A checkpoint can only be kept in step in place when it is safetensors."""
    files = facts.checkpoint_files
    if files is None or any(name.endswith(".safetensors") for name in files):
        return None
    old = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth")))
    what = f"it has only {', '.join(old[:3])}" if old else "there are no weight files in it"
    return (
        f"the checkpoint has no safetensors files ({what}): convert it with "
        f"AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
    )


def cast(facts: Facts) -> str | None:
    """Weights served in another dtype than the checkpoint's are a cast copy of it."""
    a, b = facts.checkpoint_dtype, facts.serving_dtype
    if not a or not b or a == b:
        return None
    return (
        f"the checkpoint is {a} but vLLM serves {b}: start vLLM with --dtype {a}, or convert the checkpoint with "
        f"from_pretrained(path, dtype={b!r}).save_pretrained(new_path)"
    )


def overrides(facts: Facts) -> str | None:
    """Training builds the model from the checkpoint's config.json: with another one vLLM serves another function."""
    if facts.config_override is None:
        return None
    return (
        f"{facts.config_override} makes vLLM serve another model than that of the checkpoint's config.json, which is "
        f"trained: write the change into config.json and start vLLM without {facts.config_override}"
    )


def offload(facts: Facts) -> str | None:
    """Offloaded weights are copied to the GPU again and again."""
    if not facts.cpu_offload_gb:
        return None
    return "weights are offloaded to the CPU: start vLLM without --cpu-offload-gb and --offload-group-size"


def parallel(facts: Facts) -> str | None:
    """Only tensor parallelism is exported."""
    if facts.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported: use --pipeline-parallel-size 1"
    if facts.data_parallel_size > 1:
        return "every data-parallel engine has weights of its own: use --data-parallel-size 1 and one vLLM per replica"
    if facts.prefill_context_parallel_size > 1:
        return "each prefill-context rank has weights of its own: use --prefill-context-parallel-size 1"
    if facts.eplb or facts.expert_parallel:
        return "expert parallelism moves experts between GPUs: leave out --enable-expert-parallel and --enable-eplb"
    return None


def platform(facts: Facts) -> str | None:
    """Memory can be shared on CUDA and CPU."""
    if facts.device in ("cuda", "cpu"):
        return None
    return f"weights can be shared on NVIDIA GPUs and on CPUs, not on {facts.device}"


CHECKS: Mapping[str, Callable[[Facts], str | None]] = {
    "platform": platform,
    "quantised": quantised,
    "sleep-mode": sleep_mode,
    "expandable-segments": expandable_segments,
    "freezing": freezing,
    "moe-backend": permuting_moe_backend,
    "moe-on-cpu": moe_on_cpu,
    "loader": loader,
    "no-safetensors": no_safetensors,
    "dtype": cast,
    "overrides": overrides,
    "offload": offload,
    "parallel": parallel,
}


def problems(facts: Facts) -> list[Problem]:
    """Every reason against sharing; an empty list when there is none."""
    return [
        Problem(check=name, message=message) for name, check in CHECKS.items() if (message := check(facts)) is not None
    ]


def environment_facts(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The facts that come from the environment of the process that will run (or runs) vLLM."""
    return {
        "allocator_config": environ.get("PYTORCH_CUDA_ALLOC_CONF") or environ.get("PYTORCH_ALLOC_CONF") or "",
        "freezing": environ.get("TORCHINDUCTOR_FREEZING") == "1",
    }


def checkpoint_facts(directory: Path) -> dict[str, Any]:
    """The facts that a checkpoint directory tells: files, dtype of most of the weights, quantisation, experts.

    Raises:
        ConfigError: config.json or a safetensors file can't be read.
    """
    files = tuple(sorted(path.name for path in directory.iterdir()))
    try:
        config = json.loads((directory / "config.json").read_bytes())
        sizes: Counter[str] = Counter()
        for name in files:
            if name.endswith(".safetensors"):
                sizes.update(_dtype_bytes(directory / name))
        nested = [config, *(value for value in config.values() if isinstance(value, dict))]
        quantised = next((c["quantization_config"] for c in nested if c.get("quantization_config")), None)
        experts = max((c[key] for c in nested for key in EXPERT_COUNTS if isinstance(c.get(key), int)), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{directory} is not a readable checkpoint: {error}") from error
    return {
        "checkpoint_files": files,
        "checkpoint_dtype": SAFETENSORS_DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None,
        "quantization": str(quantised.get("quant_method", "unknown")) if isinstance(quantised, dict) else None,
        "moe": experts > 1,
    }


def _dtype_bytes(path: Path) -> Counter[str]:
    """Bytes of each dtype in a safetensors file, from its header (the format: 8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"the header of {path.name} says it is {length} bytes long")
        header = json.loads(file.read(length))
    found: Counter[str] = Counter()
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[entry["dtype"]] += end - begin
    return found
