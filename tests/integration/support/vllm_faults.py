"""vLLM's loader in one process with something wrong each time; prints one JSON line per case.

    python vllm_faults.py DIRECTORY

`served` says whether vLLM loaded the model and holds the checkpoint's own values: it must, whatever happens to us.
"""

import gc
import importlib.util
import json
import logging
import os
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURES = Path(__file__).parents[2] / "acceptance" / "architectures.py"


class Lines(logging.Handler):
    """What the plugin logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def boom(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


class Bench:
    """A tiny model and vLLM's loader for it."""

    def __init__(self, base: Path) -> None:
        spec = importlib.util.spec_from_file_location("architectures", ARCHITECTURES)
        assert spec is not None and spec.loader is not None
        self.tools = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.tools)
        self.base, self.runtime = base, Path(os.environ["HOGWILD_RUNTIME_DIR"])
        self.tools.save_model("llama", base / "llama", "float32")
        self.server = self.tools.Server("cpu")
        self.log = Lines()
        from hogwild.vllm_plugin import endpoint, hooks

        # Not on vLLM's loggers: it sets those up anew with each engine config.
        hooks.logger = endpoint.logger = logging.Logger("recorded", logging.INFO)
        hooks.logger.addHandler(self.log)

    def load(self, name: str, directory: str = "llama") -> dict[str, Any]:
        """Load; say what came out."""
        import torch
        from safetensors.torch import load_file

        from hogwild.manifest import Manifest, Refusal, manifest_path, refusal_path
        from hogwild.vllm_plugin.trace import LoadTrace

        self.log.lines.clear()
        shutil.rmtree(self.runtime / name, ignore_errors=True)
        threads = set(threading.enumerate())
        model = self.server.load(self.base / directory, name)
        source = self.base / directory / "model.safetensors"
        source = source if source.exists() else self.base / "llama" / source.name
        wanted = {key: value.float() for key, value in load_file(source).items()}
        layer = model.model.layers[1]
        pairs = [
            (layer.mlp.down_proj.weight, wanted["model.layers.1.mlp.down_proj.weight"]),
            (layer.self_attn.qkv_proj.weight[:128], wanted["model.layers.1.self_attn.q_proj.weight"]),
            (model.model.norm.weight, wanted["model.norm.weight"]),
        ]
        served = all(held.numel() == 0 or torch.equal(held.float(), value) for held, value in pairs)
        x = torch.randn(2, 256)
        down = layer.mlp.down_proj.quant_method.apply(layer.mlp.down_proj, x.to(layer.mlp.down_proj.params_dtype))
        served &= torch.allclose(down.float(), x @ pairs[0][1].T, atol=0.1)
        gc.collect()
        manifest = manifest_path(self.runtime / name)
        records = Manifest.load(manifest).tensors if manifest.exists() else {}
        refusal = Refusal.load(refusal_path(self.runtime / name))
        return {
            "served": served, "manifest": manifest.exists(), "log": self.log.lines[:],
            "shared": sum(r.status == "shared" for r in records.values()),
            "refused": None if refusal is None else [name for name, _ in refusal.reasons],
            "threads": [t.name for t in threading.enumerate() if t not in threads],
            "traces": sum(isinstance(o, LoadTrace) for o in gc.get_objects()), "model": model,
        }  # fmt: skip


@contextmanager
def wrapped_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a function of vLLM (under our wrapper) for a while."""
    from hogwild.vllm_plugin import hooks

    hooks.uninstall()
    original = owner.__dict__[name]
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
        hooks.install()


def cases(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, what to do): every hook is made to fail once, and each trap sprung."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from hogwild import manifest
    from hogwild.errors import ConfigError
    from hogwild.vllm_plugin import export, hooks, trace

    def patched(target: Any, name: str, value: Any = boom) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with mock.patch.object(target, name, value):
                return bench.load("m")

        return run

    yield "fine", lambda: bench.load("m")
    yield "load_model before", patched(hooks, "facts_of")
    yield "load_weights rehome", patched(hooks, "rehome")
    yield "get_all_weights seen", patched(trace.LoadTrace, "seen")
    yield "trace copy", patched(trace.LoadTrace, "_copied")
    yield "trace other", patched(trace.LoadTrace, "_find")
    yield "hash", patched(hooks.BackgroundDigests, "submit")
    yield "cpu gemm", patched(hooks.Load, "keep_plain_linear")
    yield "load_model after", patched(export, "resolve")
    yield "manifest write", patched(manifest.Manifest, "write")
    yield "refusal write too", lambda: _both(bench, manifest)
    yield "runtime directory", patched(hooks, "private_dir")
    yield "settings", patched(hooks, "load_settings")

    def twice() -> dict[str, Any]:
        hooks.install()
        hooks.install()
        depth, function = 0, BaseModelLoader.__dict__["load_model"]
        while hasattr(function, "_hogwild_original"):
            depth, function = depth + 1, function._hogwild_original
        return {**bench.load("m"), "depth": depth}

    yield "installed twice", twice

    def missing(owner: Any, name: str, value: Any) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with wrapped_attribute(owner, name, value):
                installed, lines = hooks.install(), bench.log.lines[:]
                if value is None:
                    return {"served": True, "installed": installed, "log": lines, "manifest": False}
                return {**bench.load("m"), "installed": installed, "log": lines}

        return run

    original = DefaultModelLoader.__dict__["load_weights"]._hogwild_original
    yield "hook missing", missing(DefaultModelLoader, "get_all_weights", None)
    yield "hook changed", missing(DefaultModelLoader, "load_weights", lambda self, m, c: original(self, m, c))

    def disabled() -> dict[str, Any]:
        with mock.patch.dict(os.environ, HOGWILD_DISABLE="1"):
            hooks.uninstall()
            installed = hooks.install()
            row = bench.load("m")
        hooks.install()
        return {**row, "installed": installed}

    yield "disabled", disabled

    def reloaded(how: Callable[[Any, Any], None]) -> Callable[[], dict[str, Any]]:
        """Other weights are loaded into a model that is shared."""

        def run() -> dict[str, Any]:
            import torch
            from vllm.config import set_current_vllm_config

            row, config = bench.load("m"), _config(bench, "m")
            layer = row["model"].model.layers[1].mlp.down_proj
            path, wanted = manifest.manifest_path(bench.runtime / "m"), layer.weight.clone()
            layer.weight.zero_()
            with set_current_vllm_config(config):
                how(row["model"], config)
            x = torch.randn(2, 256)
            served = torch.equal(layer.weight, wanted)
            served &= torch.equal(layer.quant_method.apply(layer, x), torch.nn.functional.linear(x, wanted))
            return {**row, "manifest": path.exists(), "served": served, "log": bench.log.lines[:]}

        return run

    def by_its_loader(model: Any, config: Any) -> None:
        DefaultModelLoader(config.load_config).load_weights(model, config.model_config)

    def in_place(model: Any, config: Any) -> None:
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        reload_weights(config, model, None, None, True)

    def beside_another(model: Any, config: Any) -> None:
        """The name went to another export since."""
        from dataclasses import replace

        path = manifest.manifest_path(bench.runtime / "m")
        replace(manifest.Manifest.load(path), export_id="ab" * 16).write(path)
        in_place(model, config)

    yield "weights reloaded by vLLM's loader", reloaded(by_its_loader)
    yield "weights reloaded in place", reloaded(in_place)
    yield "weights reloaded after another export", reloaded(beside_another)

    def draft() -> dict[str, Any]:
        row = bench.load("m")
        path = manifest.manifest_path(bench.runtime / "m")
        inode = path.stat().st_ino
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        config, other = _config(bench, "m"), _config(bench, "m")
        with set_current_vllm_config(config):
            get_model_loader(config.load_config).load_model(vllm_config=config, model_config=other.model_config)
        return {**row, "manifest": path.exists() and path.stat().st_ino == inode}

    yield "draft model beside", draft

    def replaced(**speculative: Any) -> Callable[[], dict[str, Any]]:
        """A proposer's load of a draft whose directory is called as the served model is."""

        def run() -> dict[str, Any]:
            from vllm.config import set_current_vllm_config
            from vllm.config.utils import replace
            from vllm.model_executor.model_loader import get_model

            (bench.base / "drafts" / "m").mkdir(parents=True, exist_ok=True)
            for path in (bench.base / "llama").iterdir():
                shutil.copy(path, bench.base / "drafts" / "m")
            row = bench.load("m")
            path = manifest.manifest_path(bench.runtime / "m")
            before = manifest.Manifest.load(path).export_id
            config = _config(bench, "m", speculative_config={"num_speculative_tokens": 2, **speculative})
            draft = config.speculative_config.draft_model_config
            draft_config = replace(config, model_config=draft, quant_config=None)
            with set_current_vllm_config(draft_config):
                get_model(vllm_config=draft_config, prefix="draft_model")
            written = path.exists() and manifest.Manifest.load(path).export_id != before
            return {**row, "manifest": path.exists(), "written": written}

        return run

    yield "draft model under a configuration of its own", replaced(model=str(bench.base / "drafts" / "m"))
    yield "n-grams instead of a draft model", replaced(method="ngram", prompt_lookup_max=3)

    def post_processed() -> dict[str, Any]:
        """vLLM's post-processing computes a parameter from a loaded one, which stays as it is."""
        import torch
        from vllm.model_executor.model_loader import base_loader

        original = base_loader.process_weights_after_loading

        def process(model: Any, *arguments: Any) -> None:
            original(model, *arguments)
            model.model.norm.A = torch.nn.Parameter(-torch.exp(model.model.norm.weight), requires_grad=False)

        with mock.patch.object(base_loader, "process_weights_after_loading", process):
            row = bench.load("m")
        record = manifest.Manifest.load(manifest.manifest_path(bench.runtime / "m")).tensors["model.norm.weight"]
        return {**row, "norm": [record.status, record.reason]}

    yield "computed in post-processing", post_processed

    def bf16() -> dict[str, Any]:
        bench.tools.save_model("llama", bench.base / "bf16", "bfloat16")
        return bench.load("m", "bf16")

    yield "checkpoint of another dtype", bf16

    def beside(directory: str) -> Callable[[], dict[str, Any]]:
        """Another process shares its weights under this name."""
        from dataclasses import replace

        from hogwild.runtime_files import process_start_time

        def run() -> dict[str, Any]:
            row, path, pid = bench.load("m"), manifest.manifest_path(bench.runtime / "m"), os.getppid()
            made = manifest.Manifest.load(path)
            replace(made, pid=pid, process_start_time=process_start_time(pid), export_id="ab" * 16,
                    allocations=[replace(a, pid=pid) for a in made.allocations]).write(path)  # fmt: skip
            state, before = bench.runtime / "m" / "weights.state", path.read_bytes()
            bench.log.lines.clear()
            with mock.patch.object(hooks, "TAKEOVER_S", 0.2):
                bench.server.load(bench.base / directory, "m")
            kept = path.exists() and path.read_bytes() == before and state.exists()
            refused = manifest.refusal_path(bench.runtime / "m").exists()
            return {**row, "kept": kept, "reported": refused, "log": bench.log.lines[:], "pid": pid}

        return run

    yield "beside another vLLM", beside("llama")
    yield "refused beside another vLLM", beside("bf16")

    def only_bin() -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file

        target = bench.base / "bin"
        target.mkdir(exist_ok=True)
        (target / "config.json").write_bytes((bench.base / "llama" / "config.json").read_bytes())
        torch.save(load_file(bench.base / "llama" / "model.safetensors"), target / "pytorch_model.bin")
        return bench.load("m", "bin")

    yield "only .bin files", only_bin

    def from_hub(directory: str) -> Callable[[], dict[str, Any]]:
        """The files are not there before vLLM's loader has downloaded them."""
        from dataclasses import replace

        facts_of = hooks.facts_of

        def before(*arguments: Any) -> Any:
            return replace(facts_of(*arguments), checkpoint_files=None, checkpoint_dtype=None)

        def run() -> dict[str, Any]:
            with mock.patch.object(hooks, "facts_of", before):
                return bench.load("m", directory)

        return run

    yield "only .bin files, from the hub", from_hub("bin")
    yield "another dtype, from the hub", from_hub("bf16")
    yield "from the hub", from_hub("llama")

    def no_config(*_: Any) -> Any:
        raise ConfigError("m is not a readable checkpoint")

    yield "no readable config.json", patched(hooks, "checkpoint_facts", no_config)

    def one_of_two() -> dict[str, Any]:
        """The first engine of two for a dense model, as vLLM sets it up."""
        config = _config(bench, "m", data_parallel_size=2)
        config.parallel_config.data_parallel_index = 0
        config.parallel_config.reconfigure_for_independent_dp_rank()
        facts = hooks.facts_of(config, config.model_config, DefaultModelLoader(config.load_config))
        return {"left": config.parallel_config.data_parallel_size, "engines": facts.data_parallel_size}

    yield "one of two data-parallel engines", one_of_two

    def autotuned() -> dict[str, Any]:
        options = {"compilation_config": {"inductor_compile_config": {"max_autotune": True}}}
        with mock.patch.object(bench.server, "arguments", options):
            return bench.load("m")

    yield "max_autotune on a CPU", autotuned

    def overridden(**arguments: Any) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with mock.patch.object(bench.server, "arguments", arguments):
                return bench.load("m")

        return run

    yield "another epsilon", overridden(hf_overrides={"rms_norm_eps": 1e-3})
    yield "changed by a function", overridden(hf_overrides=lambda config: config)
    yield "another config.json", overridden(hf_config_path=str(bench.base / "bf16"))
    yield "its own config.json", overridden(hf_config_path=str(bench.base / "llama"))

    def endpoint_broken() -> dict[str, Any]:
        import vllm.plugins

        from hogwild.vllm_plugin import endpoint

        with mock.patch.object(endpoint.HogwildEndpoint, "__init__", boom):
            plugins = vllm.plugins.load_endpoint_plugins(("generate",))
        return {"served": plugins == [], "log": bench.log.lines[:], "manifest": False}

    yield "load_endpoint_plugins", endpoint_broken

    def routes_broken() -> dict[str, Any]:
        import asyncio

        import vllm.plugins

        (plugin,) = vllm.plugins.load_endpoint_plugins(("generate",))
        app = mock.Mock()
        app.post.side_effect = app.add_middleware.side_effect = app.include_router.side_effect = boom
        plugin.attach_router(app)
        asyncio.run(plugin.init_state(mock.Mock(), app.state, Namespace()))
        asyncio.run(plugin.init_state(None, app.state, Namespace()))
        return {"served": True, "log": bench.log.lines[:], "manifest": False}

    yield "routes", routes_broken


def _both(bench: Bench, manifest: Any) -> dict[str, Any]:
    with mock.patch.object(manifest.Manifest, "write", boom), mock.patch.object(manifest.Refusal, "write", boom):
        return bench.load("m")


def _config(bench: Bench, name: str, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(bench.base / "llama"), served_model_name=[name], dtype="float32", enforce_eager=True,
                      max_model_len=128, skip_tokenizer_init=True, **arguments).create_engine_config()  # fmt: skip


def main() -> None:
    base = Path(sys.argv[1])
    os.environ.update(HOGWILD_RUNTIME_DIR=str(base / "runtime"), VLLM_CPU_OMP_THREADS_BIND="nobind",
                      VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")  # fmt: skip
    bench = Bench(base)
    from vllm.plugins import load_general_plugins

    before = {thread.name for thread in threading.enumerate()}
    load_general_plugins()
    started = sorted({thread.name for thread in threading.enumerate()} - before)
    print(json.dumps({"case": "registered", "served": True, "threads": started}), flush=True)
    for name, run in cases(bench):
        bench.log.lines.clear()
        try:
            row = run()
        except Exception as error:
            row = {"served": False, "error": repr(error)}
        row.pop("model", None)
        gc.collect()
        print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main()
