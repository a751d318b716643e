"""Everything that replaces a function of vLLM; besides, only `stats.py` imports it, for the base class of its plugin.

    vLLM                                          here
    ──────────────────────────────────────────    ────────────────────────────────────────────────────────────────
    BaseModelLoader.load_model                    a Load begins: draft models and models that preflight refuses are
      │                                           passed through
      ├─ DefaultModelLoader.load_weights          CPU parameters move into shared memory; the trace starts, and goes on
      │    │                                      to the end of load_model
      │    └─ DefaultModelLoader.get_all_weights  each checkpoint tensor is announced to the trace by name
      ├─ dispatch_cpu_unquantized_gemm (CPU)      linear layers stay on F.linear instead of a private packed copy
      └─ returns                                  every landing is resolved and compared; the manifest is written
    load_endpoint_plugins (API server)            our routes are added to vLLM's own port

These five are the same from vLLM 0.26 to 0.33. `install` first checks that each exists with the expected parameters;
if one does not, nothing is patched, vLLM serves as always and a warning says so. Every exception of ours is caught
where it would enter vLLM's code: sharing fails, serving goes on.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from hogwild import config
from hogwild.config import load_settings, slug
from hogwild.errors import HogwildError
from hogwild.manifest import Manifest, Refusal, living_exports, manifest_path, refusal_path
from hogwild.preflight import (
    SAME_NAME,
    SUPPORTED_VLLM,
    Facts,
    Problem,
    checkpoint_facts,
    environment_facts,
    options_freeze,
    problems,
)
from hogwild.runtime_files import boot_id, of_this_program, private_dir, process_start_time, remove_at_exit
from hogwild.strided import Layout
from hogwild.tensors import BackgroundDigests
from hogwild.vllm_plugin import export
from hogwild.vllm_plugin.arena import Arena, Prefault, rehome
from hogwild.vllm_plugin.export import Place
from hogwild.vllm_plugin.trace import Landing, LoadTrace
from hogwild.weight_state import FILE_NAME as STATE_FILE
from hogwild.weight_state import WeightState

T = TypeVar("T")
logger = logging.getLogger("vllm.hogwild")

# How long a vLLM that ends may take until the one that replaces it gives up sharing: vLLM kills what has not ended 5 s
# after it was asked to.
TAKEOVER_S = 15.0
_LOADERS = "vllm.model_executor.model_loader"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A function of vLLM that we wrap, and the first parameters that it must have."""

    module: str
    owner: str | None
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.name)))


ALL_WEIGHTS = Hook(
    module=f"{_LOADERS}.default_loader",
    owner="DefaultModelLoader",
    name="get_all_weights",
    parameters=("self", "model_config", "model"),
)
LOAD_WEIGHTS = Hook(
    module=f"{_LOADERS}.default_loader",
    owner="DefaultModelLoader",
    name="load_weights",
    parameters=("self", "model", "model_config"),
)
LOAD_MODEL = Hook(
    module=f"{_LOADERS}.base_loader",
    owner="BaseModelLoader",
    name="load_model",
    parameters=("self", "vllm_config", "model_config"),
)
CPU_GEMM = Hook(
    module="vllm.model_executor.layers.utils",
    owner=None,
    name="dispatch_cpu_unquantized_gemm",
    parameters=("layer", "remove_weight"),
)
ENDPOINTS = Hook(module="vllm.plugins", owner=None, name="load_endpoint_plugins", parameters=("supported_tasks",))
HOOKS = (ALL_WEIGHTS, LOAD_WEIGHTS, LOAD_MODEL, CPU_GEMM, ENDPOINTS)

_MARK = "_hogwild_original"
_PLAIN = "_hogwild_plain_linear"  # on layers that were given plain F.linear


def missing_hooks() -> list[str]:
    """What this vLLM lacks of what we wrap; empty when everything is as expected."""
    missing = []
    for hook in HOOKS:
        try:
            function = _owner(hook).__dict__[hook.name]
        except (ImportError, AttributeError, KeyError) as error:
            missing.append(f"{hook} is missing ({error})")
            continue
        function = getattr(function, _MARK, function)
        try:
            found = tuple(inspect.signature(function).parameters)
        except (TypeError, ValueError) as error:
            missing.append(f"{hook} can't be inspected ({error})")
            continue
        if found[: len(hook.parameters)] != hook.parameters:
            missing.append(f"{hook}({', '.join(found)}) should begin with ({', '.join(hook.parameters)})")
    return missing


def install() -> bool:
    """Wrap vLLM's functions in this process; does nothing when that was done. Returns whether training is possible."""
    if load_settings().disable:
        logger.info("hogwild: switched off by HOGWILD_DISABLE")
        return False
    missing = missing_hooks()
    if missing:
        logger.warning(
            "hogwild: training is off; vLLM %s serves as usual. This hogwild supports vLLM %s: %s",
            vllm_version(),
            SUPPORTED_VLLM,
            "; ".join(missing),
        )
        return False
    for hook, wrapper in (
        (ALL_WEIGHTS, _get_all_weights),
        (LOAD_WEIGHTS, _load_weights),
        (LOAD_MODEL, _load_model),
        (CPU_GEMM, _dispatch_cpu_gemm),
        (ENDPOINTS, _load_endpoint_plugins),
    ):
        _wrap(hook, wrapper)
    return True


def uninstall() -> None:
    """Put vLLM's own functions back (for tests)."""
    for hook in HOOKS:
        owner = _owner(hook)
        original = getattr(owner.__dict__[hook.name], _MARK, None)
        if original is not None:
            setattr(owner, hook.name, original)


def _owner(hook: Hook) -> Any:
    module = importlib.import_module(hook.module)
    return getattr(module, hook.owner) if hook.owner else module


def _wrap(hook: Hook, wrapper: Callable[..., Any]) -> None:
    owner = _owner(hook)
    original = owner.__dict__[hook.name]
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, hook.name, wrapped)


# --- the wrappers: nothing of ours may raise out of here -------------------------------------------------------------

_current: "Load | None" = None
_exported: list["Load"] = []


def _guarded(load: "Load", step: Callable[..., T], *args: Any, default: T) -> T:
    """A step of ours inside vLLM's code: what it raises ends sharing, not vLLM."""
    if load.failed is not None:
        return default
    try:
        return step(*args)
    except Exception as error:
        load.failed = error
        logger.exception("hogwild: sharing failed; vLLM serves, training is off")
        return default


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    global _current
    outer, load = _current, None
    try:
        load = _begin(original, self, args, kwargs)
    except Exception:
        logger.exception("hogwild: sharing could not begin; vLLM serves, training is off")
    _current = load
    try:
        model = original(self, *args, **kwargs)
    finally:
        _current = outer
        if load is not None:
            load.release()
    if load is not None:
        _guarded(load, load.finish, model, default=None)
        load.forget()
        if load.failed is not None:
            _report_failure(load, load.failed)
    return model


def _report_failure(load: "Load", error: BaseException) -> None:
    if isinstance(error, HogwildError):
        problem = Problem(check=error.slug, message=error.message)
    else:
        problem = Problem(check="internal", message=f"sharing failed: {error!r}; vLLM's log has the details")
    try:
        load.refuse([problem])
    except Exception:
        logger.exception("hogwild: nor could the report of that be written")


def _load_weights(original: Callable[..., Any], self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    load = _current
    if load is None:
        _overwritten(model)
        return original(self, model, *args, **kwargs)
    _guarded(load, load.prepare, model, default=None)
    loaded = original(self, model, *args, **kwargs)
    _guarded(load, load.loaded, default=None)
    return loaded


def _get_all_weights(
    original: Callable[..., Any], self: Any, model_config: Any, model: Any, *args: Any, **kwargs: Any
) -> Iterator[tuple[str, Any]]:
    load = _current
    if load is None:  # `reload_weights` asks for the tensors only, and loads them itself
        _overwritten(model)
    for name, tensor in original(self, model_config, model, *args, **kwargs):
        if load is not None:
            _guarded(load, load.seen, name, tensor, default=None)
        yield name, tensor


def _overwritten(model: Any) -> None:
    """vLLM loads weights into a model outside a load of ours: if it is an exported one, that export ends."""
    for load in _exported:
        _guarded(load, load.overwritten, model, default=None)


def _dispatch_cpu_gemm(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    # Packing (oneDNN, sgl-kernel, zentorch) keeps a private copy: writes to the weight would not be served.
    load = _current
    if load is not None and _guarded(load, load.keep_plain_linear, layer, default=False):
        return None
    if load is None and getattr(layer, _PLAIN, False):  # a reload: vLLM puts the weights into the parameters it serves
        layer.cpu_linear = torch.nn.functional.linear
        return None
    return original(layer, *args, **kwargs)


def _load_endpoint_plugins(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    plugins = original(*args, **kwargs)
    try:
        from hogwild.vllm_plugin.endpoint import HogwildEndpoint

        return [*plugins, HogwildEndpoint(model_runtime_dir, withdraw)]
    except Exception:
        logger.exception("hogwild: no routes on vLLM's port")
        return plugins


# --- one load ------------------------------------------------------------------------------------------------------


class Load:
    """The load of the served model, from before its weights arrive until they are exported."""

    def __init__(self, model_config: Any, runtime_dir: Path, download_dir: str | None = None) -> None:
        self.model_config = model_config
        self.download_dir = download_dir
        self.runtime_dir = runtime_dir
        self.rank, self.size = tensor_parallel()
        self.export_id = secrets.token_hex(16) if self.size == 1 else shared_export_id()
        self.seconds = 0.0  # what sharing added to vLLM's load, less the hashing beside it
        self.facts = Facts()  # what preflight was asked with
        self.failed: BaseException | None = None
        self._arena: Arena | None = None
        self._prefault: Prefault | None = None
        self._trace: LoadTrace | None = None
        self._tracing = ExitStack()
        self._digests: BackgroundDigests | None = None
        self._places: dict[int, list[Place]] = {}
        self._layouts: dict[Place, Layout] = {}
        self._model: weakref.ReferenceType[Any] | None = None  # once exported

    def prepare(self, model: Any) -> None:
        """Before the weights arrive: shared memory on CPU, then the trace begins; it goes on until `release`."""
        self._tracing.close()
        started = time.monotonic()
        with torch.no_grad():
            if self.facts.device == "cpu":  # on a GPU the model may have given it addresses of host memory already
                self._arena = rehome(model, slug(served_name(self.model_config)))
                self._prefault = Prefault(self._arena)
            self._places = export.places_by_storage(model)
            self._layouts = export.layouts_of(model)
        digests = self._digests = BackgroundDigests()

        def landed(landing: Landing, source: torch.Tensor) -> None:
            landing.digest = digests.submit(source)

        self._trace = LoadTrace(landed)
        self.seconds += time.monotonic() - started
        self._tracing.enter_context(self._trace)

    def seen(self, name: str, tensor: Any) -> None:
        """A checkpoint tensor is about to be loaded."""
        if self._trace is not None:
            self._trace.seen(name, tensor)

    def loaded(self) -> None:
        """The weights have arrived; vLLM post-processes them next."""
        if self._trace is not None:
            self._trace.loaded()

    def keep_plain_linear(self, layer: Any) -> bool:
        """Give a CPU layer with a two-dimensional weight plain F.linear; False to let vLLM decide."""
        if self._arena is None or layer.weight.ndim != 2 or layer.weight.is_meta:
            return False
        layer.cpu_linear = torch.nn.functional.linear
        setattr(layer, _PLAIN, True)
        return True

    def release(self) -> None:
        """The load is over, well or not: end the trace and the threads beside it. Never raises."""
        self._tracing.close()
        if self._prefault is not None:
            self._prefault.finish()
        if self._digests is not None:
            self._digests.close()

    def finish(self, model: Any) -> None:
        """Resolve, compare, write the manifest.

        Raises:
            HogwildError, OSError: and whatever went wrong while tracing.
        """
        started = time.monotonic()
        if self._trace is None:
            self.refuse([Problem(check="loader", message="vLLM's default loader did not load these weights")])
            return
        if self._trace.failed is not None:
            raise self._trace.failed
        if self.facts.checkpoint_files is None:  # a name on the hub, which only this load downloaded
            directory = Path(checkpoint_path(self.model_config, self.download_dir))
            if self.download_dir and not (directory / "config.json").exists():
                self.refuse([weights_alone(self.model_config.model)])
                return
            refusals = problems(replace(self.facts, **_files_and_dtype(directory)))
            if refusals:
                self.refuse(refusals)
                return
        with torch.no_grad():
            resolved = export.resolve(model, self._trace, self._places, self._layouts, logger)
            served = torch.device(self.facts.device)
            device = next((p.device for p in model.parameters() if p.device.type == served.type), served)
            memory = export.place(resolved, device, self._arena)
        self.seconds += time.monotonic() - started
        if (other := self.void(TAKEOVER_S)) is not None:
            self._say([same_name(other)])
            return
        path = self._publish(memory)
        self._model = weakref.ref(model)
        _exported.append(self)
        for name, record in memory.records.items():
            if record.status != "shared":
                logger.warning("hogwild: %s is %s: %s", name, record.status, record.reason)
        what = "can be trained while it is served" if self.size == 1 else f"rank {self.rank} of {self.size} is exported"
        logger.info(
            "hogwild: %s %s: %s; found and compared in %.2f s; %s",
            served_name(self.model_config),
            what,
            export.summary(memory.records),
            self.seconds,
            path,
        )

    def _publish(self, memory: export.Memory) -> Path:
        private_dir(self.runtime_dir)
        pid = os.getpid()
        manifest = Manifest(
            export_id=self.export_id,
            model_path=checkpoint_path(self.model_config, self.download_dir),
            served_model_name=served_name(self.model_config),
            vllm_version=vllm_version(),
            pid=pid,
            process_start_time=process_start_time(pid),
            boot_id=boot_id(),
            device=memory.device,
            gpu_uuid=memory.gpu_uuid,
            tensor_parallel_rank=self.rank,
            tensor_parallel_size=self.size,
            max_model_len=int(self.model_config.max_model_len),
            vocab_size=int(self.model_config.get_vocab_size()),
            dtype=dtype_name(self.model_config.dtype),
            created_at=time.time(),
            trust_remote_code=bool(self.model_config.trust_remote_code),
            allocations=tuple(memory.allocations),
            tensors=memory.records,
        )
        if self.rank == 0:
            WeightState.create(self.runtime_dir / STATE_FILE, self.export_id).close()
        path = manifest_path(self.runtime_dir, self.rank)
        refusal_path(self.runtime_dir, self.rank).unlink(missing_ok=True)
        manifest.write(path)
        remove_at_exit(path)
        return path

    def refuse(self, refusals: list[Problem]) -> None:
        """Log why the weights are not shared and leave the report where the manifest would be, unless another's is."""
        self._say(refusals)
        if self.void(TAKEOVER_S) is None:
            report(refusals, served_name(self.model_config), refusal_path(self.runtime_dir, self.rank))

    def _say(self, refusals: list[Problem]) -> None:
        name = served_name(self.model_config)
        for problem in refusals:
            logger.warning("hogwild: the weights of %s are not shared: %s [%s]", name, problem.message, problem.check)

    def void(self, patience_s: float = 0.0) -> int | None:
        """Whatever an earlier vLLM of this name left does not hold any more, its weight version neither.

        One that goes on sharing its weights after `patience_s` seconds keeps its files; its process id is returned.
        """
        deadline = time.monotonic() + patience_s
        while (other := self._other()) is not None:
            if time.monotonic() >= deadline:
                return other
            time.sleep(0.1)
        manifest_path(self.runtime_dir, self.rank).unlink(missing_ok=True)
        if self.rank == 0:
            (self.runtime_dir / STATE_FILE).unlink(missing_ok=True)
        return None

    def _other(self) -> int | None:
        """Process of another vLLM that shares its weights under this name; other ranks of ours have our export id."""
        found = living_exports(self.runtime_dir)
        return next((pid for _, pid, export_id in found if pid != os.getpid() and export_id != self.export_id), None)

    def forget(self) -> None:
        """Everything but the shared memory itself has done its work."""
        self._trace = self._digests = self._prefault = None
        self._places, self._layouts = {}, {}

    def overwritten(self, model: Any) -> None:
        """vLLM loads other weights into the exported model: the export does not hold any more."""
        if self._model is not None and self._model() is model:
            for path, _, export_id in living_exports(self.runtime_dir):
                if export_id == self.export_id and path == manifest_path(self.runtime_dir, self.rank):
                    path.unlink(missing_ok=True)
            logger.warning("hogwild: vLLM is loading new weights; sharing ends until vLLM is restarted")


def _begin(original: Callable[..., Any], loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Load | None:
    """The load to watch, or None for a model that is not ours to share."""
    bound = inspect.signature(original).bind(loader, *args, **kwargs)
    vllm_config, model_config = bound.arguments["vllm_config"], bound.arguments["model_config"]
    if is_draft(vllm_config, model_config):
        return None
    download_dir = getattr(vllm_config.load_config, "download_dir", None)
    load = Load(model_config, private_dir(model_runtime_dir(vllm_config)), download_dir)
    try:
        if load.void() is None:
            refusal_path(load.runtime_dir, load.rank).unlink(missing_ok=True)
        load.facts = facts_of(vllm_config, model_config, loader)
        refusals = problems(load.facts)
        if refusals:
            load.refuse(refusals)
    except Exception as error:
        logger.exception("hogwild: sharing could not begin; vLLM serves, training is off")
        _report_failure(load, error)
        return None
    return None if refusals else load


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether this is a draft model for speculative decoding and not the model that is served.

    Some proposers load theirs under a copy of the configuration in which it is *the* model, so that its being another
    than `vllm_config.model_config` is not enough. Without a draft model (n-grams) vLLM calls the target its own draft.
    """
    if model_config is not vllm_config.model_config or getattr(model_config, "runner_type", None) == "draft":
        return True
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return draft is model_config and draft is not getattr(speculative, "target_model_config", None)


def report(refusals: list[Problem], name: str, path: Path) -> None:
    """Write why the weights of the model `name` are not shared, for as long as this process lives."""
    pid = os.getpid()
    Refusal(
        reasons=tuple((p.check, p.message) for p in refusals),
        pid=pid,
        boot_id=boot_id(),
        served_model_name=name,
        vllm_version=vllm_version(),
        process_start_time=process_start_time(pid),
    ).write(path)
    remove_at_exit(path)


def weights_alone(model: str) -> Problem:
    """The refusal where vLLM downloaded the weights away from the model's other files."""
    return Problem(
        check="loader",
        message=f"--download-dir holds the weights of {model} without their config.json, and training needs both: "
        f"download the model into one directory (hf download {model} --local-dir DIR) and serve that",
    )


def same_name(pid: int) -> Problem:
    """The refusal beside another vLLM, which keeps the name."""
    return Problem(
        check=SAME_NAME,
        message=f"another vLLM (pid {pid}) shares its weights under this name: start this one with another "
        f"--served-model-name, or stop that one first",
    )


def withheld(vllm_config: Any) -> Problem | None:
    """Why this front end is not that of the weights that are shared under its model's name; asked when it is ready."""
    several = problems(Facts(data_parallel_size=engines(getattr(vllm_config, "parallel_config", None))))
    _, others = _exports(vllm_config)
    return next(iter([*several, *map(same_name, others)]), None)


def withdraw(vllm_config: Any) -> Problem | None:
    """`withheld`; with several engines, what one of them shared in ignorance of the others is taken back."""
    problem = withheld(vllm_config)
    if problem is None or problem.check == SAME_NAME:
        return problem
    directory = model_runtime_dir(vllm_config)
    ours, others = _exports(vllm_config)
    for path in ours:
        path.unlink(missing_ok=True)
    if not others:
        (directory / STATE_FILE).unlink(missing_ok=True)
        report([problem], served_name(vllm_config.model_config), refusal_path(directory))
    return problem


def _exports(vllm_config: Any) -> tuple[list[Path], list[int]]:
    """The manifests of this front end's engines, and the processes of other vLLMs that share weights under its name."""
    executor = getattr(getattr(vllm_config, "parallel_config", None), "distributed_executor_backend", None)
    ours: list[Path] = []
    others: list[int] = []
    for path, pid, _ in living_exports(model_runtime_dir(vllm_config)):
        if executor not in ("uni", "mp") or of_this_program(pid):  # who started those of others (Ray) can't be told
            ours.append(path)
        else:
            others.append(pid)
    return ours, others


# --- what vLLM decided ---------------------------------------------------------------------------------------------


def facts_of(vllm_config: Any, model_config: Any, loader: Any) -> Facts:
    """Preflight's facts as this vLLM knows them."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform

    parallel, offload = vllm_config.parallel_config, getattr(vllm_config, "offload_config", None)
    uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
    path = Path(model_config.model)
    checkpoint = _files_and_dtype(path) if path.is_dir() else {}
    inductor = getattr(torch._inductor, "config", None) if hasattr(torch, "_inductor") else None
    options = getattr(vllm_config.compilation_config, "inductor_compile_config", None) or {}
    environment = environment_facts()
    known = {"cpu": current_platform.is_cpu(), "cuda": current_platform.is_cuda()}
    device = next((name for name, is_it in known.items() if is_it), current_platform.device_name)
    return Facts(
        device=device,
        quantization=model_config.quantization
        or (type(vllm_config.quant_config).__name__ if vllm_config.quant_config else None),
        sleep_mode=bool(getattr(model_config, "enable_sleep_mode", False)),
        cumem_allocator=bool(getattr(model_config, "enable_cumem_allocator", False)),
        load_format=str(vllm_config.load_config.load_format),
        default_loader=isinstance(loader, DefaultModelLoader),
        serving_dtype=dtype_name(model_config.dtype),
        moe=bool(getattr(model_config, "is_moe", False)),
        moe_backend=getattr(getattr(vllm_config, "kernel_config", None), "moe_backend", None),
        allocator_config=environment["allocator_config"],
        freezing=environment["freezing"]
        or bool(getattr(inductor, "freezing", False))
        or options_freeze(options, device),
        cpu_offload_gb=float(getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0) or 0),
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=engines(parallel),
        prefill_context_parallel_size=getattr(parallel, "prefill_context_parallel_size", 1),
        eplb=bool(parallel.enable_eplb),
        expert_parallel=bool(parallel.enable_expert_parallel),
        remote_weights=getattr(model_config, "model_weights", None) or None,
        config_override=config_override(model_config),
        **checkpoint,
    )


def config_override(model_config: Any) -> str | None:
    """The argument by which vLLM's configuration of the model is another than the checkpoint's, if there is one."""
    if getattr(model_config, "hf_overrides", None):  # keys and values, or a function
        return "--hf-overrides"
    path = getattr(model_config, "hf_config_path", None)
    return "--hf-config-path" if path and path != model_config.model else None


def engines(parallel_config: Any) -> int:
    """At least how many engines serve the model, each with weights of its own.

    Within an engine of a dense model vLLM sets the number back to 1; what else was made of it still tells.
    """
    size, most, index = (
        getattr(parallel_config, name, None) or 0
        for name in ("data_parallel_size", "elastic_ep_max_dp_size", "data_parallel_index")
    )
    return max(size, most, index + 1)


def _files_and_dtype(directory: Path) -> dict[str, Any]:
    """What only the checkpoint's files tell; the rest of its facts vLLM knows better."""
    facts = checkpoint_facts(directory)
    return {name: facts[name] for name in ("checkpoint_files", "checkpoint_dtype")}


def model_runtime_dir(vllm_config: Any) -> Path:
    """Where the manifest of this vLLM's model belongs."""
    return load_settings().runtime_dir / slug(served_name(vllm_config.model_config))


def served_name(model_config: Any) -> str:
    """The name that everything of ours goes by."""
    return config.served_name(model_config.served_model_name, model_config.model)


def checkpoint_path(model_config: Any, download_dir: str | None) -> str:
    """The local directory that the weights came from; vLLM downloads them into `download_dir`, if there is one."""
    if Path(model_config.model).is_dir():
        return str(Path(model_config.model).resolve())
    from huggingface_hub import snapshot_download

    name, revision = model_config.model, model_config.revision
    return str(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))


def tensor_parallel() -> tuple[int, int]:
    """Rank and size of this process in the tensor-parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def shared_export_id() -> str:
    """One export id for all tensor-parallel ranks: they are children of one executor, and nothing else is."""
    parent = os.getppid()
    return hashlib.blake2b(f"{boot_id()} {parent} {process_start_time(parent)}".encode(), digest_size=16).hexdigest()


def vllm_version() -> str:
    """Version of the running vLLM, whatever its distribution is called."""
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def dtype_name(dtype: Any) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
