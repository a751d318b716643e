"""Attaching across processes: a real exporter, real shared memory, real kills."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sharing_processes import Exporter, elsewhere, own_files
from transformers import AutoModelForCausalLM, LlamaConfig

from hogwild.errors import AlreadyAttached, AttachRefused, ExporterGone, ManifestError, ShareError
from hogwild.frontend import Frontend
from hogwild.gpu_worker.attach import Attachment, attach, open_views
from hogwild.gpu_worker.lifecycle import Lifecycle, State
from hogwild.gpu_worker.model import build_model
from hogwild.manifest import Manifest, Refusal, manifest_path, refusal_path, sweep
from hogwild.runtime_files import boot_id, process_start_time
from hogwild.weight_state import WeightState


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, as a checkpoint directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtime" / "tiny"


@pytest.fixture
def start(checkpoint: Path, runtime_dir: Path) -> Iterator[Callable[[], Exporter]]:
    running: list[Exporter] = []

    def begin() -> Exporter:
        running.append(Exporter(checkpoint, runtime_dir))
        return running[-1]

    yield begin
    for exporter in running:
        exporter.kill()


@pytest.fixture
def exporter(start: Callable[[], Exporter]) -> Exporter:
    return start()


def test_the_model_on_the_views_is_the_served_model(exporter: Exporter, runtime_dir: Path, checkpoint: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with attach(runtime_dir) as attachment:
        assert attachment.verify().tensors == len(attachment.views)
        model = build_model(attachment)
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, reference(ids).logits)
        addresses = {view.data_ptr() for view in attachment.views.values()}
        assert {parameter.data_ptr() for parameter in model.parameters()} == addresses
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert set(model.hogwild_sources["model.norm.weight"]) == {"model.norm.weight"}
        del model


def test_a_step_is_seen_by_the_exporter_and_by_the_next_worker(exporter: Exporter, runtime_dir: Path) -> None:
    code = """
with attach(Path(runtime_dir)) as a:
    model = build_model(a)
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    a.weights.begin()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad, alpha=-0.1)
    a.weights.applied()
    print(a.views["model.norm.weight"].sum().item(), a.verify().against)
    del model, p
"""
    manifest = Manifest.load(manifest_path(runtime_dir))
    with open_views(manifest) as views:
        before = views["model.norm.weight"].clone()
        printed, error = elsewhere(code, runtime_dir=str(runtime_dir))
        assert not error
        after = views["model.norm.weight"].clone()
        views.clear()
    assert not torch.equal(before, after)
    value, against = printed.split(maxsplit=1)
    assert after.sum().item() == pytest.approx(float(value))
    assert against.strip() == "export id: trained since export"
    assert WeightState.open(runtime_dir / "weights.state").version == 1


def test_weights_that_changed_without_training_are_refused(exporter: Exporter, runtime_dir: Path) -> None:
    with attach(runtime_dir) as attachment:
        attachment.views["model.norm.weight"][0] += 1
        with pytest.raises(AttachRefused, match=r"1 of \d+ tensors differ .* model.norm.weight"):
            attachment.verify()


def test_verify_tells_its_progress(exporter: Exporter, runtime_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    with attach(runtime_dir) as attachment:
        attachment.verify(lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1] == sum(view.nbytes for view in attachment.views.values())
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_second_worker_refused_until_the_first_is_gone(exporter: Exporter, runtime_dir: Path) -> None:
    code = "attach(Path(runtime_dir))"
    with attach(runtime_dir):
        _, error = elsewhere(code, runtime_dir=str(runtime_dir))
        assert "AlreadyAttached" in error
        assert f"(pid {os.getpid()})" in error
        with pytest.raises(AlreadyAttached):
            attach(runtime_dir)
    assert elsewhere(code, runtime_dir=str(runtime_dir)) == ("", "")


def test_worker_killed_lets_the_next_one_in(exporter: Exporter, runtime_dir: Path) -> None:
    elsewhere("a = attach(Path(runtime_dir)); os.kill(os.getpid(), signal.SIGKILL)", runtime_dir=str(runtime_dir))
    attach(runtime_dir).close()


def test_exporter_killed_while_attached_the_mapping_still_holds(exporter: Exporter, runtime_dir: Path) -> None:
    with attach(runtime_dir) as attachment:
        assert attachment.alive()
        attachment.views["model.norm.weight"].fill_(3)

        exporter.kill()

        assert not attachment.alive()
        assert attachment.views["model.norm.weight"].eq(3).all()
        attachment.views["model.norm.weight"].fill_(4)  # and what is in it can still be rolled back and saved
        assert attachment.views["model.norm.weight"].eq(4).all()
    with pytest.raises(ExporterGone):
        attach(runtime_dir)


def test_twenty_workers_come_and_go_and_the_exporters_memory_stays(exporter: Exporter, runtime_dir: Path) -> None:
    attach(runtime_dir).close()
    process, files = psutil.Process(exporter.process.pid), own_files()
    before = process.memory_full_info().uss
    for _ in range(20):
        with attach(runtime_dir) as attachment:
            assert sum(float(view.sum()) for view in attachment.views.values()) != 0
    assert abs(process.memory_full_info().uss - before) < 1 << 20
    gc.collect()  # what tests before left open ends now or later
    assert own_files() <= files


def test_nothing_is_left_behind_when_all_are_killed(exporter: Exporter, runtime_dir: Path) -> None:
    elsewhere("a = attach(Path(runtime_dir)); os.kill(os.getpid(), 9)", runtime_dir=str(runtime_dir))
    exporter.kill()
    assert not [name for name in os.listdir("/dev/shm") if "hogwild" in name]
    sweep(runtime_dir)
    assert os.listdir(runtime_dir) == ["worker.lock"]  # empty, and free


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is vLLM running"):
        attach(tmp_path)


def test_refusal_instead_of_a_manifest(tmp_path: Path) -> None:
    pid = os.getpid()
    Refusal(
        reasons=(("quantised", "the weights are quantised (fp8): serve the unquantised checkpoint"),),
        served_model_name="tiny", vllm_version="0.32.0", pid=pid, process_start_time=process_start_time(pid),
        boot_id=boot_id(),
    ).write(refusal_path(tmp_path))  # fmt: skip
    with pytest.raises(AttachRefused, match=r"does not share the weights of tiny: .* quantised \(fp8\)") as caught:
        attach(tmp_path)
    assert caught.value.details["checks"] == ["quantised"]


def changed(runtime_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Tamper with the manifest."""
    path = manifest_path(runtime_dir)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refuses(runtime_dir: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        attach(runtime_dir)


def test_tensor_parallel_is_refused(exporter: Exporter, runtime_dir: Path) -> None:
    changed(runtime_dir, lambda data: data["__metadata__"].update(tensor_parallel_size=2))
    refuses(runtime_dir, AttachRefused, "--tensor-parallel-size 1")


def test_a_manifest_that_names_a_larger_memory_than_there_is(exporter: Exporter, runtime_dir: Path) -> None:
    changed(runtime_dir, lambda data: data["allocations"][0].update(size=1 << 40))
    refuses(runtime_dir, ManifestError, "the manifest says")


def test_a_manifest_that_names_another_file(exporter: Exporter, runtime_dir: Path) -> None:
    changed(runtime_dir, lambda data: data["allocations"][0].update(fd=0))
    refuses(runtime_dir, ShareError, "not the shared memory|can't open|does not hold")


def test_a_container_that_may_not_look_into_vllm(
    exporter: Exporter, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ptrace restricted, or another user namespace: the kernel answers EACCES for /proc/<pid>/fd."""
    really = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).startswith(f"/proc/{exporter.process.pid}/fd/"):
            raise PermissionError(13, "Permission denied")
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    refuses(runtime_dir, AttachRefused, "Permission denied.*as vLLM's user.*share the PID namespace")


def test_a_long_verification_says_where_it_is(
    exporter: Exporter, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hogwild.gpu_worker.attach.PROGRESS_S", 0.0)
    with attach(runtime_dir) as attachment, caplog.at_level("INFO"):
        attachment.verify()
    assert "comparing weights with vLLM's: 0.0 of 0.0 GB" in caplog.text


def test_a_manifest_of_another_export_than_the_weight_state(exporter: Exporter, runtime_dir: Path) -> None:
    WeightState.create(runtime_dir / "weights.state", "0" * 32).close()
    refuses(runtime_dir, ManifestError, "another export")


def test_a_refused_attach_leaves_the_lock_free(exporter: Exporter, runtime_dir: Path) -> None:
    good = manifest_path(runtime_dir).read_text()
    changed(runtime_dir, lambda data: data["allocations"][0].update(size=1 << 40))
    refuses(runtime_dir, ManifestError, "the manifest says")
    manifest_path(runtime_dir).write_text(good)
    attach(runtime_dir).close()


def test_a_matrix_that_is_not_shared_refuses_the_model_with_the_list(exporter: Exporter, runtime_dir: Path) -> None:
    def derive(data: dict[str, Any]) -> None:
        for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
            data["tensors"][name] |= {"status": "unequal", "reason": "permuted", "allocation": None}

    changed(runtime_dir, derive)
    with attach(runtime_dir) as attachment, pytest.raises(AttachRefused, match=r"2 of \d+ .*permuted") as caught:
        build_model(attachment)
    assert sorted(caught.value.details["tensors"]) == [
        "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight",
    ]  # fmt: skip


def test_a_vector_that_is_not_shared_becomes_a_constant(exporter: Exporter, runtime_dir: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    changed(runtime_dir, lambda data: data["tensors"][name].update(status="derived", reason="cast", allocation=None))
    with attach(runtime_dir) as attachment:
        model = build_model(attachment)
        parameter = model.get_parameter(name)
        assert not parameter.requires_grad
        assert parameter.eq(1).all()
        assert "cast" in model.hogwild_constants[name]
        assert sum(not p.requires_grad for p in model.parameters()) == 1
        del model, parameter


# --- the state machine -----------------------------------------------------------------------------------------------


class Seen:
    """A worker's ends of the lifecycle."""

    def __init__(self, runtime_dir: Path) -> None:
        self.events: list[str] = []
        self.saved: float | None = None
        self.states: list[State] = []
        self.lifecycle = Lifecycle(
            runtime_dir, on_attached=self.attached, on_lost=self.lost, clock=lambda: self.now,
            on_change=lambda: self.states.append(self.lifecycle.state),
        )  # fmt: skip
        self.now = 0.0

    def attached(self, attachment: Attachment) -> None:
        self.events.append("attached")

    def lost(self, attachment: Attachment) -> None:
        self.events.append("lost")
        self.saved = float(attachment.views["model.norm.weight"].sum())
        attachment.close()

    def poll(self) -> State:
        return self.lifecycle.poll()


def test_vllm_comes_goes_and_comes_back(start: Callable[[], Exporter], runtime_dir: Path) -> None:
    seen = Seen(runtime_dir)
    assert seen.poll() is State.DETACHED
    assert "no vLLM has exported" in seen.lifecycle.reason

    first = start()
    assert seen.poll() is State.VERIFIED
    assert seen.lifecycle.describe()["verified_against"] == "exporter's hashes"
    attachment = seen.lifecycle.attachment
    assert attachment is not None
    export = attachment.manifest.export_id
    attachment.views["model.norm.weight"].fill_(2)

    first.kill()
    assert seen.poll() is State.DETACHED
    assert seen.events == ["attached", "lost"]
    assert seen.states == ["detached", "attaching", "verified", "lost", "detached"]  # each that a poll went through
    assert seen.saved == 64.0  # what was trained could be read after vLLM was gone
    assert seen.poll() is State.DETACHED  # the manifest of the dead is not attached to
    assert "not running any more" in seen.lifecycle.reason

    start()
    assert seen.poll() is State.VERIFIED
    again = seen.lifecycle.attachment
    assert again is not None
    assert again.manifest.export_id != export
    seen.lifecycle.close()


def test_manifest_replaced_under_a_living_worker(start: Callable[[], Exporter], runtime_dir: Path) -> None:
    start()
    seen = Seen(runtime_dir)
    seen.poll()
    start()  # as a vLLM does beside an engine whose front end was killed
    assert seen.poll() is State.DETACHED
    assert seen.poll() is State.VERIFIED
    assert seen.events == ["attached", "lost", "attached"]
    seen.lifecycle.close()


def test_vllm_that_does_not_serve_yet_is_waited_for(exporter: Exporter, runtime_dir: Path) -> None:
    front = (runtime_dir / "frontend.json").read_text()
    (runtime_dir / "frontend.json").unlink()
    seen = Seen(runtime_dir)
    assert seen.poll() is State.WAITING
    (runtime_dir / "frontend.json").write_text(front)
    (runtime_dir / "frontend.json").chmod(0o600)
    assert seen.poll() is State.VERIFIED
    seen.lifecycle.close()


def test_refused_until_the_other_worker_is_gone(exporter: Exporter, runtime_dir: Path) -> None:
    seen = Seen(runtime_dir)
    with attach(runtime_dir):
        assert seen.poll() is State.REFUSED
        assert "another worker" in seen.lifecycle.reason
        assert seen.poll() is State.REFUSED
    seen.now += 60
    assert seen.poll() is State.VERIFIED
    seen.lifecycle.close()


def test_what_fails_in_attaching_is_a_state_that_says_why_and_is_not_tried_at_once_again(
    exporter: Exporter, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, tries = Seen(runtime_dir), []

    def fail(self: Attachment) -> None:
        tries.append(self)
        raise RuntimeError("no kernel image")

    with monkeypatch.context() as patched:
        patched.setattr(Attachment, "verify", fail)
        assert seen.poll() is State.REFUSED
        assert "RuntimeError: no kernel image" in seen.lifecycle.reason
        seen.poll()
    assert len(tries) == 1
    seen.now += 60
    assert seen.poll() is State.VERIFIED
    seen.lifecycle.close()


def test_hostile_manifest_is_a_state_not_a_crash(exporter: Exporter, runtime_dir: Path) -> None:
    manifest_path(runtime_dir).write_text('{"__metadata__": {')
    seen = Seen(runtime_dir)
    assert seen.poll() is State.REFUSED
    assert "truncated or not JSON" in seen.lifecycle.describe()["reason"]


# --- the front end ---------------------------------------------------------------------------------------------------


def test_the_front_end_answers_and_is_gone_with_its_process(start: Callable[[], Exporter], runtime_dir: Path) -> None:
    assert Frontend.load(runtime_dir) is None if runtime_dir.exists() else True
    exporter = start()
    frontend = Frontend.load(runtime_dir)
    assert frontend is not None
    assert frontend.reset_prefix_cache() is True
    exporter.kill()
    assert Frontend.load(runtime_dir) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"url": 1}', '{"url": 1, "pid": 2}', "[" * 9999])
def test_a_damaged_front_end_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "frontend.json").write_text(text)
    (tmp_path / "frontend.json").chmod(0o600)
    with pytest.raises(ManifestError, match="is damaged"):
        Frontend.load(tmp_path)


