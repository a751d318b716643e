"""Settings of a Hogwild process, read once at its edge from the environment (`HOGWILD_*`).

Nothing below the edge reads the environment: rooms take values or frozen config dataclasses. `hogwild up --help` lists
every field here with its default and description.
"""

import ipaddress
import json
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hogwild.errors import ConfigError
from hogwild.gpu_worker.config import OptimizerName

PrefixCachePolicy = Literal["after_job", "every_n_steps", "never"]

# Of vLLM's speed, what it keeps beside training unless something else is asked for.
SERVE_SHARE = 0.9
# The last sync of a worker that stops, or whose vLLM is gone: so many seconds, and more for large models. The rate, in
# bytes of weights a second, is that of a slow disk; undo data of the sync before may have to be made first.
LAST_SYNC_S = 90.0
LAST_SYNC_RATE = 100e6


def default_runtime_dir() -> Path:
    """Where vLLM and the worker meet: per user, gone after a reboot, as the weights in memory are."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():
        return Path(base) / "hogwild"
    return Path(tempfile.gettempdir()) / f"hogwild-{os.getuid()}"


class Settings(BaseSettings):
    """All settings; each is `HOGWILD_<NAME>` in the environment."""

    model_config = SettingsConfigDict(
        env_prefix="HOGWILD_", env_ignore_empty=True, extra="ignore", populate_by_name=True, protected_namespaces=()
    )

    # --- what is served -------------------------------------------------------------------------------------------
    model: str | None = Field(None, description="Model to serve: a local Hugging Face model directory.")
    served_model_name: str | None = Field(
        None, description="Name clients use; default: the last part of the model's path."
    )
    vllm_host: str = Field("127.0.0.1", description="Address vLLM listens on.")
    vllm_port: int = Field(8000, ge=1, le=65535, description="Port vLLM listens on.")
    vllm_args: str = Field("", description="More arguments for `vllm serve`, as in a shell.")
    vllm_url: str | None = Field(
        None, description="URL of the vLLM to use; default: what the plugin published in the runtime directory."
    )
    vllm_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("HOGWILD_VLLM_API_KEY", "VLLM_API_KEY"),
        description="API key of vLLM, when it has one.",
    )

    # --- places ---------------------------------------------------------------------------------------------------
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir, description="Manifests and sockets; the same for vLLM and the worker."
    )
    data_dir: Path = Field(Path(".hogwild"), description="Logs, the embedded Redis' files, checkpoints.")
    checkpoint_dir: Path | None = Field(
        None, description="Directory kept in step with the live weights; default: <data_dir>/checkpoints/<model>."
    )

    disable: bool = Field(False, description="Switch the vLLM plugin off: vLLM then runs as if it were not installed.")

    # --- services -------------------------------------------------------------------------------------------------
    redis_url: str | None = Field(None, description="Redis to use; unset: an embedded server is started.")
    redis_port: int = Field(6390, ge=1, le=65535, description="Port of the embedded server.")
    api_host: str = Field("127.0.0.1", description="Address the API listens on.")
    api_port: int = Field(8100, ge=1, le=65535, description="Port the API listens on.")
    flower_host: str = Field("127.0.0.1", description="Address Flower listens on.")
    flower_port: int = Field(5555, ge=1, le=65535, description="Port Flower listens on.")
    api_key: SecretStr | None = Field(None, min_length=1, description="Key every API route but /livez asks for.")
    api_keys_file: Path | None = Field(None, description="File with several named, hashed API keys (see docs/api.md).")
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Origins browsers may call the API from, separated by commas; none by default."
    )
    rate_limit: int = Field(0, ge=0, description="Requests a minute for each API key; 0: no limit.")

    # --- jobs -----------------------------------------------------------------------------------------------------
    queue_limit: int = Field(10_000, ge=1, description="Jobs that may wait; more are answered 429.")
    queue_bytes: int = Field(4 << 30, ge=1, description="Bytes of samples that may wait in Redis' memory, 4 a token "
                             "(8 with a weight); more are answered 429.")
    max_body_bytes: int = Field(64 << 20, ge=1024, description="Largest request body, in bytes.")
    vllm_max_json_bytes: int = Field(1 << 20, ge=1024, description="Largest JSON body on vLLM's own port, in bytes: "
                                     "reading one holds up the tokens that are streamed there.")
    max_sample_tokens: int | None = Field(
        None, ge=2, description="Longest sample (context + continuation); default: the model's own limit."
    )
    max_job_samples: int = Field(100_000, ge=1, description="Most samples in one job.")
    job_retention_s: float = Field(30 * 86400.0, gt=0, description="Seconds a finished job stays in the ledger.")
    job_time_limit_s: float = Field(6 * 3600.0, gt=0, description="Most seconds that one job may train; "
                                    "waiting for vLLM does not count.")

    # --- training -------------------------------------------------------------------------------------------------
    optimizer: OptimizerName = Field("apollo", description="Optimizer of jobs that name none.")
    learning_rate: float | None = Field(None, gt=0, description="Rate of jobs that name none; default: by optimizer.")
    replay: float = Field(1.0, ge=0, le=1000, description="Weight of staying as it was on text of its own, of jobs "
                          "that name none; 0: no replay.")
    replay_openings: Path | None = Field(None, description="Text file with an opening on each line for the text to "
                                         "replay, in the languages and styles served; default: 32 English ones.")
    prefix_cache_policy: PrefixCachePolicy = Field("after_job", description="When vLLM forgets cached prefixes.")
    prefix_cache_steps: int = Field(10, ge=1, description="n of every_n_steps.")
    itl_budget_ms: float | None = Field(None, gt=0, description="Inter-token latency to hold, in ms.")
    serve_share: float | None = Field(None, ge=0, le=1, description="Share of its speed that vLLM keeps while training "
                                      f"runs; 0: training never yields. Default: {SERVE_SHARE}, 0 with a budget.")
    mps: Literal["auto", "on", "off"] = Field(
        "auto", description="NVIDIA MPS, so that serving and training overlap on the card: auto starts it where it can."
    )
    mps_threads: int | None = Field(
        None, ge=1, le=100, description="Percent of the card's multiprocessors training may use under MPS; unset: all."
    )
    mps_parts: Literal["auto", "off"] = Field(
        "auto", description="Under MPS and beside traffic, training's matrix products keep to a quarter, half or three "
        "quarters of the multiprocessors instead of taking all of them for a part of the time; off: always all."
    )
    mps_priority: Literal["normal", "low"] = Field("low", description="Priority of training's kernels under MPS.")
    compile_layers: Literal["auto", "on", "off"] = Field(
        "auto", description="Run the decoder layers through torch.compile while training: auto does on a GPU."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the worker; default: torch's own choice.")

    # --- checkpoints ----------------------------------------------------------------------------------------------
    sync_quiet_s: float = Field(600.0, ge=0, description="A sync starts when training was quiet for this long.")
    sync_max_age_s: float = Field(3600.0, gt=0, description="... or when unsaved steps are older than this.")
    sync_tick_s: float = Field(30.0, gt=0, description="How often beat asks whether a sync is due.")
    last_sync_s: float | None = Field(None, gt=0, description="Most seconds for saving what is unsaved when the worker "
                                      f"stops or vLLM is gone; default: {LAST_SYNC_S:.0f}, and "
                                      f"{1e9 / LAST_SYNC_RATE:.0f} for each GB of weights.")
    keep_last: int = Field(8, ge=1, description="Checkpoint generations that can be rolled back to.")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):  # as `hogwild up` hands it to its services
            return json.loads(value)
        return [origin.strip() for origin in value.split(",") if origin.strip()]

    @field_validator("redis_url")
    @classmethod
    def _has_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        urlsplit(url or "").port  # noqa: B018 - a port that is none is a ValueError
        return url

    @field_validator("api_key")
    @classmethod
    def _can_be_flowers(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and "," in key.get_secret_value():
            raise ValueError("must have no comma: Flower would take it for several logins")
        return key

    @field_validator("vllm_args")
    @classmethod
    def _can_be_split(cls, words: str) -> str:
        shlex.split(words)  # quotes that don't close are a ValueError
        return words

    @field_validator("replay_openings")
    @classmethod
    def _has_openings(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"can't be read as UTF-8 text: {error}") from None
            if not text.strip():
                raise ValueError("holds no line with an opening")
        return path

    @property
    def model_name(self) -> str:
        """Served model name; also names the queue `train.<name>` and the manifest's folder."""
        return served_name(self.served_model_name, self.model or "default")

    @property
    def model_slug(self) -> str:
        """`model_name` as a file name: anything outside [A-Za-z0-9._-] becomes '_'."""
        return slug(self.model_name)

    @property
    def queue(self) -> str:
        """Celery queue of this model."""
        return f"train.{self.model_name}"

    @property
    def model_runtime_dir(self) -> Path:
        """`<runtime_dir>/<model>`: manifest, weight state, vLLM's address."""
        return self.runtime_dir / self.model_slug

    @property
    def kept_share(self) -> float | None:
        """Share of its speed that vLLM keeps while training runs; None: training does not yield for it."""
        share = self.serve_share
        if share is None:
            share = SERVE_SHARE if self.itl_budget_ms is None else 0.0
        return share or None

    def last_sync_bound(self, weight_bytes: int) -> float:
        """Seconds that a model of that size gets for its last sync."""
        return self.last_sync_s or LAST_SYNC_S + weight_bytes / LAST_SYNC_RATE

    @property
    def deployment_file(self) -> Path:
        """Where `hogwild up` leaves (0600) what the routes on the port of an older vLLM must know of it."""
        return self.model_runtime_dir / "deployment.json"

    @property
    def model_checkpoint_dir(self) -> Path:
        """The directory that syncs write to."""
        return self.checkpoint_dir or self.data_dir / "checkpoints" / self.model_slug


def load_settings(**given: Any) -> Settings:
    """Settings from the environment with `given` on top; a wrong one raises ConfigError naming it and the variable."""
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            name = str(e["loc"][0])
            got = "" if name.endswith("key") else f"got {e['input']!r}; "
            lines.append(f"{'.'.join(map(str, e['loc']))}: {e['msg']} ({got}HOGWILD_{name.upper()})")
        raise ConfigError("; ".join(lines)) from None


def served_name(names: str | list[str] | None, model: str) -> str:
    """The name a model is served under: the first of `names`, or the last part of its path when none was given."""
    name = names if isinstance(names, str) or not names else names[0]
    if name and name != model:  # vLLM's name of a model without one is the model's path
        return str(name)
    path = Path(model)
    return path.name if path.name not in {"", ".."} else path.resolve().name  # a link keeps its own name


def url_host(host: str) -> str:
    """A listening address as the host of a URL that one can connect to."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether who listens on this address is reached from this machine alone; '' is every address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def slug(name: str) -> str:
    """A served model name as one safe path component."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "model"
