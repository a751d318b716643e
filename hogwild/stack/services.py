"""Which processes a stack is made of: command lines, environment, ports, how to see that each is up."""

import importlib.metadata
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from hogwild.api.auth import keys_of
from hogwild.config import Settings, is_loopback, url_host
from hogwild.errors import ConfigError, HogwildError
from hogwild.manifest import Manifest, manifest_path
from hogwild.mps import Mps, worker_limits
from hogwild.stack import embedded_redis
from hogwild.stack.vllm_arguments import expanded

# Tokens of KV cache a CPU vLLM gets, in GiB: enough for a small model's demo, small enough for a laptop.
CPU_KV_CACHE_GIB = 1
# Share of the card that vLLM takes when the user names none: the rest is for gradients, activations and optimizer.
GPU_MEMORY_UTILIZATION = 0.80
# Before and after the worker's last sync: the end of a step, or of a call to a Redis that hangs (30 s); of the process.
WORKER_STOP_S = 60.0
DEV = Path("/dev")
# Options of vLLM that `hogwild up` gives itself, and the settings they come from.
OWN_OPTIONS = {
    "--host": "HOGWILD_VLLM_HOST",
    "--port": "HOGWILD_VLLM_PORT",
    "--served-model-name": "HOGWILD_SERVED_MODEL_NAME",
    "--model": "HOGWILD_MODEL",
}
# ... and those with which vLLM does not answer HTTP at that host and port.
ELSEWHERE = ("--uds", "--ssl-keyfile", "--ssl-certfile", "--headless", "--grpc")


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process of the stack."""

    name: str
    argv: list[str]
    priority: int  # supervisor starts the lowest first and stops it last
    stop_wait_s: int  # seconds between SIGTERM and SIGKILL
    port: int | None = None
    port_setting: str = ""
    host: str = "127.0.0.1"
    url: str = ""  # what a user opens
    ready_url: str = ""  # answers 200 when the service is up; empty: there is nothing to ask
    env: dict[str, str] = field(default_factory=dict)  # besides what all services share


def settings_env(settings: Settings) -> dict[str, str]:
    """The settings as the environment of a child process, paths made absolute."""
    env: dict[str, str] = {}
    for name, value in settings:
        if value is None:
            continue
        env[f"HOGWILD_{name.upper()}"] = _text(value)
    return env


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, list):
        return json.dumps(value)
    return str(value)


def environment(settings: Settings) -> dict[str, str]:
    """The environment all services share: of Hogwild's variables, what the settings say and nothing else."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("HOGWILD_") and k != "VLLM_API_KEY"}
    env = {**others, **settings_env(settings)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if settings.api_key:
        env["FLOWER_BASIC_AUTH"] = f"hogwild:{settings.api_key.get_secret_value()}"
    if settings.vllm_api_key:
        env["VLLM_API_KEY"] = settings.vllm_api_key.get_secret_value()
    if not has_gpu():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
        # vLLM would pin its threads to cores and the trainer would share them anyway: let the kernel decide.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Threads that spin while they wait keep the other process off the core: with both busy a forward pass of the
        # demo's model took 0.2 s with sleeping threads and up to 4 s with spinning ones.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def check_access(settings: Settings, *, vllm: bool) -> None:
    """Raise ConfigError when a service would be open to the network, or when the API keys file can't be used."""
    keys = bool(keys_of(settings))
    services = [("The API", "api", keys), ("Flower", "flower", settings.api_key is not None)]  # it takes no keys file
    if vllm:
        own = "--api-key" in _names(shlex.split(settings.vllm_args))
        services.append(("vLLM", "vllm", keys or own or settings.vllm_api_key is not None))
    for title, name, guarded in services:
        host = getattr(settings, f"{name}_host")
        if not guarded and not is_loopback(host):
            raise ConfigError(
                f"{title} would listen on {host} without a key: set HOGWILD_API_KEY, "
                f"or HOGWILD_{name.upper()}_HOST=127.0.0.1."
            )


def check_vllm(settings: Settings) -> None:
    """Raise ConfigError when the vLLM that is started would be somewhere else than it is looked for, or untrained."""
    words = shlex.split(settings.vllm_args)
    for name in _names(words):
        if any(option.startswith(name) for option in ELSEWHERE):  # vLLM takes abbreviations
            raise ConfigError(
                f"hogwild up can't start a vLLM with {name}, as it reaches it by plain HTTP at HOGWILD_VLLM_HOST and "
                "HOGWILD_VLLM_PORT: start that vLLM yourself and join it with --no-vllm."
            )
    for name in _options(words):  # what vLLM's config file says of these gives way to the command line
        for option, setting in OWN_OPTIONS.items():
            if option.startswith(name):
                raise ConfigError(f"{option} is not for HOGWILD_VLLM_ARGS: set {setting} instead.")
    if settings.disable:
        raise ConfigError("HOGWILD_DISABLE is set, so vLLM's weights would not be shared: unset it.")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "hogwild" not in plugins.split(","):
        raise ConfigError(f"VLLM_PLUGINS={plugins} leaves hogwild out, so vLLM's weights would not be shared: add it.")


def has_gpu() -> bool:
    """Whether vLLM will run on an NVIDIA GPU: a container may have any one of the host's; WSL has them at /dev/dxg."""
    if _installed("vllm-cpu"):
        return False
    cards = any(DEV.glob("nvidia[0-9]*")) or (DEV / "dxg").exists()
    return cards and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in {"", "-1"}


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _names(words: Sequence[str]) -> set[str]:
    """The options among vLLM's arguments, those of its `--config` file included."""
    return _options(expanded(words))


def _options(words: Sequence[str]) -> set[str]:
    return {word.split("=", 1)[0].replace("_", "-") for word in words if word.startswith("--") and word != "--"}


def vllm_command(settings: Settings, model_dir: Path) -> list[str]:
    """`vllm serve`, or the same server by its module where the distribution is vllm-cpu (whose command fails)."""
    extra = shlex.split(settings.vllm_args)
    given = _names(extra)
    if _installed("vllm"):
        argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir)]
    else:
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    argv += [
        "--served-model-name",
        settings.model_name,
        "--host",
        settings.vllm_host,
        "--port",
        str(settings.vllm_port),
    ]
    if "--dtype" not in given:
        # 'auto' may cast what is on disk; views and checkpoint must hold the same bits.
        cloned = (model_dir / "config.json").exists()
        argv += ["--dtype", checkpoint_dtype(model_dir if cloned else Path(settings.model or ""))]
    if has_gpu():
        if "--gpu-memory-utilization" not in given:
            argv += ["--gpu-memory-utilization", str(GPU_MEMORY_UTILIZATION)]
    elif not given & {"--enforce-eager", "--no-enforce-eager"}:
        argv += ["--enforce-eager"]  # starts in a third of the time; on CPU, compiling gains little
    return argv + extra


def checkpoint_dtype(model_dir: Path) -> str:
    """The dtype that a model's config names, for `--dtype`."""
    try:
        config = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir} is not a Hugging Face model directory: {error}") from error
    config = {**config, **config.get("text_config", {})}
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def weight_bytes(settings: Settings) -> int:
    """Size of the model that is, or will be, served; 0 when there is nothing to see yet."""
    directories = [settings.model_checkpoint_dir, *([Path(settings.model)] if settings.model else [])]
    for directory in directories:
        with suppress(OSError):
            if nbytes := sum(path.stat().st_size for path in directory.glob("*.safetensors")):
                return nbytes
    with suppress(HogwildError):
        return sum(a.size for a in Manifest.load(manifest_path(settings.model_runtime_dir)).allocations)
    return 0


def build(settings: Settings, *, vllm: bool, mps: Mps | None = None) -> list[Service]:
    """The services of a stack, in the order they start."""
    python = sys.executable
    data = settings.data_dir.resolve()
    celery = [python, "-m", "celery", "-A"]
    last_sync = settings.last_sync_bound(weight_bytes(settings))
    services = []
    if settings.redis_url is None:
        config = embedded_redis.write_config(data / "redis", settings.redis_port)
        services.append(
            Service(
                name="redis",
                argv=[str(embedded_redis.server_binary()), str(config)],
                priority=10,
                stop_wait_s=30,
                port=settings.redis_port,
                port_setting="HOGWILD_REDIS_PORT",
            )
        )
    if vllm:
        base = f"http://{url_host(settings.vllm_host)}:{settings.vllm_port}"
        services.append(
            Service(
                name="vllm",
                argv=vllm_command(settings, settings.model_checkpoint_dir.resolve()),
                priority=20,
                stop_wait_s=45,
                host=settings.vllm_host,
                port=settings.vllm_port,
                port_setting="HOGWILD_VLLM_PORT",
                url=base,
                ready_url=f"{base}/health",
                env=mps.environment() if mps else {},
            )
        )
    services.append(
        Service(
            name="worker",
            priority=30,
            env={
                **(mps.worker_environment() if mps else worker_limits(settings)),  # a joined vLLM may be under MPS
                "HOGWILD_LAST_SYNC_S": str(last_sync),  # what it is waited for
            },
            stop_wait_s=math.ceil(last_sync + WORKER_STOP_S),
            argv=[
                *celery,
                "hogwild.tasks.worker:app",
                "worker",
                "-Q",
                settings.queue,
                "-n",
                f"{settings.model_slug}@%h",
                "-c",
                "1",
                "--pool",
                "prefork",
                "-E",
                "--loglevel",
                "INFO",
            ],
        )
    )
    api = f"http://{url_host(settings.api_host)}:{settings.api_port}"
    services.append(
        Service(
            name="api",
            priority=40,
            stop_wait_s=15,
            host=settings.api_host,
            port=settings.api_port,
            port_setting="HOGWILD_API_PORT",
            url=api,
            ready_url=f"{api}/livez",
            argv=[
                python,
                "-m",
                "uvicorn",
                "hogwild.api.app:main",
                "--factory",
                "--host",
                settings.api_host,
                "--port",
                str(settings.api_port),
                "--no-access-log",
                "--timeout-graceful-shutdown",
                "5",
            ],
        )
    )
    services.append(
        Service(
            name="beat",
            priority=50,
            stop_wait_s=15,
            argv=[
                *celery,
                "hogwild.tasks.schedule:app",
                "beat",
                "--schedule",
                str(data / "beat" / "schedule"),
                "--pidfile",
                "",
                "--loglevel",
                "WARNING",
            ],
        )
    )
    flower = f"http://{url_host(settings.flower_host)}:{settings.flower_port}"
    services.append(
        Service(
            name="flower",
            priority=60,
            stop_wait_s=15,
            host=settings.flower_host,
            port=settings.flower_port,
            port_setting="HOGWILD_FLOWER_PORT",
            url=flower,
            ready_url=f"{flower}/healthcheck",
            argv=[
                *celery,
                "hogwild.tasks.app:app",
                "flower",
                f"--address={settings.flower_host}",
                f"--port={settings.flower_port}",
                "--persistent=True",
                f"--db={data / 'flower' / 'flower.db'}",
            ],
        )
    )
    return services
