"""vLLM's own arguments, as vLLM reads them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hogwild.errors import ConfigError


def expanded(words: Sequence[str]) -> list[str]:
    """The arguments with those of a `--config FILE` (YAML) before them, where vLLM puts them: later ones win.

    Raises:
        ConfigError: the file can't be read, or is not what vLLM takes.
    """
    words = list(words)
    if "--config" not in words:
        return words
    at = words.index("--config")
    if at + 1 == len(words):
        raise ConfigError("the arguments for vLLM are wrong: --config has no file")
    return [*_of_file(Path(words[at + 1])), *words[:at], *words[at + 2 :]]


def _of_file(path: Path) -> Iterator[str]:
    import yaml  # comes with vLLM

    try:
        config: Any = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the arguments for vLLM are wrong: --config {path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the arguments for vLLM are wrong: --config {path} must hold `name: value` lines")
    for name, value in config.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, list):
            yield from [f"--{name}", *map(str, value)] if value else ()
        else:
            yield from (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
