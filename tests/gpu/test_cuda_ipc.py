"""Raw CUDA IPC between real processes on a real GPU, without vLLM: what test_stack_gpu.py relies on, part by part.

Skipped without CUDA. Run: python -m pytest tests/gpu/test_cuda_ipc.py
and, with vLLM 0.26 to 0.33 for CUDA installed, for every architecture:
python tests/acceptance/architectures.py --device cuda --table docs/architectures.md
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402 - after the skip

from hogwild.errors import AttachRefused, ExporterGone, ManifestError  # noqa: E402
from hogwild.gpu_worker.attach import attach, open_views  # noqa: E402
from hogwild.gpu_worker.model import build_model  # noqa: E402
from hogwild.manifest import Manifest, manifest_path  # noqa: E402
from hogwild.tensors import digest  # noqa: E402

EXPORTER = Path(__file__).with_name("cuda_exporter.py")
NORM = "model.norm.weight"
pytestmark = pytest.mark.timeout(300)


class Exporter:
    """A process that holds the weights."""

    def __init__(self, checkpoint: Path, runtime_dir: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EXPORTER), str(checkpoint), str(runtime_dir)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert self._line() == "exported"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=5000, max_position_embeddings=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def exporter(checkpoint: Path, runtime_dir: Path) -> Iterator[Exporter]:
    process = Exporter(checkpoint, runtime_dir)
    yield process
    process.kill()


HEAD = "import os\nfrom pathlib import Path\nimport torch\nfrom hogwild.gpu_worker.attach import attach\n"


def elsewhere(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})  # fmt: skip


class Python:
    """A process that runs `code` and answers line by line."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HEAD + code], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip

    def say(self, line: str | None = None) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        if line is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> "Python":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_views_are_the_exporters_memory_in_both_directions(exporter: Exporter, runtime_dir: Path) -> None:
    with attach(runtime_dir) as attachment:
        assert attachment.device.type == "cuda"
        assert attachment.verify().tensors == len(attachment.views)
        attachment.views[NORM].fill_(3)
        torch.cuda.synchronize()
        assert exporter.ask(f"sum {NORM}") == 3 * 512
        assert digest(attachment.views[NORM]) != attachment.manifest.tensors[NORM].hash


def test_the_model_has_the_logits_of_the_checkpoint(exporter: Exporter, runtime_dir: Path, checkpoint: Path) -> None:
    ids = torch.arange(2, 40, device="cuda")[None]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).cuda().eval()
    with attach(runtime_dir) as attachment:
        model = build_model(attachment)
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, reference(ids).logits)
        del model


def test_twenty_workers_come_and_go_and_the_exporters_memory_stays(
    exporter: Exporter, runtime_dir: Path, memory_of: Callable[[int], int]
) -> None:
    # Forked before CUDA is touched: twenty processes, one import of torch.
    code = f"""
print("imported", flush=True)
for _ in range(21):
    input()
    child = os.fork()
    if child == 0:
        attach(Path({str(runtime_dir)!r})).verify()
        os.kill(os.getpid(), 9)
    print(os.waitpid(child, 0)[1], flush=True)
"""
    with Python(code) as workers:
        assert workers.say() == "imported"
        assert workers.say("first") == "9"
        before = memory_of(exporter.process.pid)
        assert [workers.say("next") for _ in range(20)] == ["9"] * 20
    assert memory_of(exporter.process.pid) == before
    with attach(runtime_dir) as attachment:  # and the memory was never given to anybody else
        attachment.verify()


def test_two_consumers_at_once(exporter: Exporter, runtime_dir: Path) -> None:
    manifest = Manifest.load(manifest_path(runtime_dir))
    with attach(runtime_dir) as attachment:
        code = f"""
from hogwild.gpu_worker.attach import open_views
from hogwild.manifest import Manifest
with open_views(Manifest.load(Path({str(manifest_path(runtime_dir))!r}))) as views:
    print(views[{NORM!r}].float().sum().item())
    views.clear()
"""
        attachment.views[NORM].fill_(2)
        torch.cuda.synchronize()
        done = elsewhere(code)
        assert float(done.stdout) == 2 * 512, done.stderr
        attachment.views[NORM].fill_(1)  # the other's end took nothing away
        torch.cuda.synchronize()
        assert exporter.ask(f"sum {NORM}") == 512
    assert manifest.exporter_alive()


def test_exporter_killed_while_attached_the_mapping_still_holds(exporter: Exporter, runtime_dir: Path) -> None:
    with attach(runtime_dir) as attachment:
        attachment.views[NORM].fill_(5)
        torch.cuda.synchronize()
        exporter.kill()
        assert not attachment.alive()
        assert attachment.views[NORM].float().sum().item() == 5 * 512
        saved = {name: view.cpu() for name, view in attachment.views.items()}
        assert saved[NORM].eq(5).all()
    with pytest.raises(ExporterGone):
        attach(runtime_dir)


def test_a_worker_that_does_not_see_the_gpu_is_refused(exporter: Exporter, runtime_dir: Path) -> None:
    done = elsewhere(f"attach(Path({str(runtime_dir)!r}))", CUDA_VISIBLE_DEVICES="")
    assert "sees no CUDA device" in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_gpu_is_found_by_uuid_whatever_its_number(checkpoint: Path, runtime_dir: Path) -> None:
    exporter = Exporter(checkpoint, runtime_dir, CUDA_VISIBLE_DEVICES="1")
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",").index("1")
    try:
        with attach(runtime_dir) as attachment:
            assert attachment.device == torch.device("cuda", mine)
            attachment.verify()
        done = elsewhere(f"attach(Path({str(runtime_dir)!r}))", CUDA_VISIBLE_DEVICES="0")
        assert "CUDA_VISIBLE_DEVICES" in done.stderr
    finally:
        exporter.kill()


def changed(runtime_dir: Path, **allocation: Any) -> None:
    path = manifest_path(runtime_dir)
    data = json.loads(path.read_text())
    data["allocations"][0] |= allocation
    path.write_text(json.dumps(data))


def test_hostile_handles_and_sizes_are_errors(exporter: Exporter, runtime_dir: Path) -> None:
    good = manifest_path(runtime_dir).read_text()
    changed(runtime_dir, size=1 << 50)
    with pytest.raises(AttachRefused, match="the manifest says"):
        attach(runtime_dir)
    manifest_path(runtime_dir).write_text(good)
    changed(runtime_dir, handle="ab" * 64)
    with pytest.raises(ManifestError, match="damaged"):
        attach(runtime_dir)
    manifest_path(runtime_dir).write_text(good)
    changed(runtime_dir, handle="")
    with pytest.raises(ManifestError):
        attach(runtime_dir)
    manifest_path(runtime_dir).write_text(good)
    attach(runtime_dir).close()


def test_expandable_segments_are_refused_by_name(checkpoint: Path, runtime_dir: Path) -> None:
    code = """
from hogwild.vllm_plugin.cuda_export import CudaAllocations
try:
    CudaAllocations().locate(torch.ones(1 << 20, device="cuda"))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = elsewhere(code, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert done.stdout.startswith("AttachRefused"), done.stdout + done.stderr
    assert "expandable_segments" in done.stdout


def test_views_of_open_views_close_cleanly(exporter: Exporter, runtime_dir: Path) -> None:
    for _ in range(3):
        with open_views(Manifest.load(manifest_path(runtime_dir))) as views:
            assert len(views) > 30
            views.clear()
