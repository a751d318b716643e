"""The commands, on a real checkpoint and against a real HTTP server that answers as the API does."""

import errno
import json
import os
import tarfile
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from hogwild.checkpoint.reports import VerifyReport
from hogwild.checkpoint.store import CheckpointStore
from hogwild.cli import checkpoint as commands
from hogwild.errors import CheckpointCorrupt, CheckpointError, ConfigError, HogwildError, NotFound, ServiceUnavailable

app = typer.Typer()
commands.register(app)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(commands.console, "width", 200)

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout if result.exit_code == 0 else f"exit {result.exit_code}: {result.stdout}"

    return invoke


@pytest.fixture
def directory(model, tmp_path, io):
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io) as store:
        for version in (1, 2):
            model.views["norm.weight"].fill_(version)
            store.sync(model.views, weight_version=version, jobs=[f"job-{number}" for number in range(version * 2)])
    return tmp_path / "c"


def norm(directory):
    return load_file(directory / "model-00001-of-00002.safetensors")["norm.weight"][0].item()


def test_list(run, directory):
    text = run("checkpoint", "list", "-d", directory)
    assert "job-0, job-1, job-2 and 1 more" in text
    listed = json.loads(run("checkpoint", "list", "-d", directory, "--json"))
    assert [(entry["generation"], entry["kind"]) for entry in listed] == [(2, "sync"), (1, "sync"), (0, "clone")]


def test_no_command_forgets_a_generation(run, model, tmp_path, io):
    """Given more generations than are kept by default."""
    with CheckpointStore.open(tmp_path / "c", source=model.directory, io=io, keep_last=30) as store:
        for version in range(1, 13):
            model.views["norm.weight"].fill_(version)
            store.sync(model.views, weight_version=version)
    assert len(json.loads(run("checkpoint", "list", "-d", tmp_path / "c", "--json"))) == 13
    run("checkpoint", "export", tmp_path / "e", "-g", 2, "-d", tmp_path / "c")
    assert norm(tmp_path / "e") == 2
    run("checkpoint", "repair", "-d", tmp_path / "c")
    assert "contents of generation 3" in run("rollback", 3, "--offline", "-d", tmp_path / "c")
    assert len(json.loads(run("checkpoint", "list", "-d", tmp_path / "c", "--json"))) == 14


def test_export_of_a_checkpoint_in_place_leaves_stale_weights_out(model, tmp_path, io):
    """Given the model's own directory, where weights in other formats lie beside the safetensors."""
    (model.directory / "consolidated.safetensors").write_bytes(b"a duplicate")
    with CheckpointStore.open(model.directory, io=io) as store:
        store.export(tmp_path / "e")
        store.export(tmp_path / "e.tar")
    expected = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    expected |= {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {path.name for path in (tmp_path / "e").iterdir()} == expected
    with tarfile.open(tmp_path / "e.tar") as tar:
        assert set(tar.getnames()) == expected


def test_a_failed_export_leaves_no_half_tar_and_says_what_to_remove(directory, tmp_path, io, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointStore.open(directory, read_only=True, io=io) as store:
        with monkeypatch.context() as patched:
            patched.setattr(tarfile.TarFile, "addfile", full)
            with pytest.raises(CheckpointError, match=r"the disk is full .*\. The checkpoint itself was not touched"):
                store.export(tmp_path / "e.tar")
        assert not list(tmp_path.glob("e.tar*"))
        with monkeypatch.context() as patched:
            patched.setattr(io, "create", full)
            with pytest.raises(CheckpointError, match=f"{tmp_path / 'e'} is incomplete: remove it"):
                store.export(tmp_path / "e")


def test_a_tar_stream_that_nobody_reads_on(directory, io):
    reading, writing = os.pipe()
    os.close(reading)
    with (
        CheckpointStore.open(directory, read_only=True, io=io) as store,
        open(writing, "wb", buffering=0) as stream,
        pytest.raises(CheckpointError, match=r"the export failed: Broken pipe\. The checkpoint itself"),
    ):
        store.export(stream)


def test_list_works_beside_a_running_writer(run, directory):
    with CheckpointStore.open(directory):
        assert "job-0" in run("checkpoint", "list", "-d", directory)
        with pytest.raises(CheckpointError, match="kept by another process"):
            run("checkpoint", "adopt", "-d", directory)


def test_list_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, hogwild.checkpoint.store, hogwild.cli.checkpoint; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verify(run, directory):
    text = run("checkpoint", "verify", "-d", directory)
    assert "blocks are right on disk. Live weights were not compared: a directory was named." in text
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointCorrupt, match="differ from generation 2"):
        run("checkpoint", "verify", "-d", directory)
    assert run("checkpoint", "verify", "-d", directory, "--json").startswith('exit 1: {"generation": 2')
    # ... and adopt accepts what is there
    assert "generation 3 has the files as they are" in run("checkpoint", "adopt", "-d", directory)
    assert "blocks are right" in run("checkpoint", "verify", "-d", directory)
    assert "nothing to adopt" in run("checkpoint", "adopt", "-d", directory)


def test_adopt_recovers_from_a_damaged_record(run, directory):
    path = directory / ".hogwild/generations/00000002.commit"
    path.write_bytes(path.read_bytes()[:-1])
    for command in (("checkpoint", "repair"), ("rollback", 1, "--offline"), ("checkpoint", "verify")):
        with pytest.raises(CheckpointCorrupt, match="`hogwild checkpoint adopt`"):
            run(*command, "-d", directory)
    text = run("checkpoint", "adopt", "-d", directory)
    assert "generation 3 has the files as they are. Lost, as their records were damaged: 0, 1, 2." in text
    assert norm(directory) == 2
    assert "blocks are right" in run("checkpoint", "verify", "-d", directory)


def test_export(run, directory, tmp_path):
    assert "generation 1 is in" in run("checkpoint", "export", tmp_path / "e", "-g", 1, "-d", directory)
    assert norm(tmp_path / "e") == 1
    run("checkpoint", "export", tmp_path / "e.tar", "-d", directory)
    with tarfile.open(tmp_path / "e.tar") as tar:
        tar.extractall(tmp_path / "t", filter="data")
    assert norm(tmp_path / "t") == 2
    with pytest.raises(NotFound):
        run("checkpoint", "export", tmp_path / "f", "-g", 9, "-d", directory)


def test_offline_rollback_and_repair(run, directory):
    assert "generation 3 has the contents of generation 1" in run("rollback", 1, "--offline", "-d", directory)
    assert norm(directory) == 1
    assert "nothing to do" in run("rollback", 3, "--offline", "-d", directory)
    assert "generation 3 is in place" in run("checkpoint", "repair", "-d", directory)


def test_a_directory_is_not_ignored_for_the_live_model(run, directory, api):
    with pytest.raises(ConfigError, match="--directory goes with --offline"):
        run("rollback", 1, "-d", directory)
    assert not api[1] and norm(directory) == 2


def test_a_directory_that_is_no_checkpoint_is_left_alone(run, tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="is no checkpoint"):
        run("checkpoint", "repair", "-d", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HOGWILD_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("HOGWILD_CHECKPOINT_DIR", raising=False)
    with pytest.raises(NotFound, match="Set HOGWILD_MODEL"):
        run("checkpoint", "list")


# --- through the API --------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """A server that answers with what it is given, in order, and remembers what it was asked."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            asked.append((self.command, self.path, self.rfile.read(length), self.headers.get("Authorization")))
            status, body = answers.pop(0)
            data = json.dumps(body).encode() if not isinstance(body, bytes) else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HOGWILD_API_PORT", str(server.server_port))
    monkeypatch.setenv("HOGWILD_API_HOST", "0.0.0.0")
    monkeypatch.setenv("HOGWILD_API_KEY", "secret")
    yield answers, asked
    server.shutdown()
    thread.join()
    server.server_close()


ATTACHED = {"worker": {"alive": True, "attached": True}}


def test_save_waits_for_the_worker(run, api):
    answers, asked = api
    result = {
        "generation": 4,
        "blocks_changed": 1200,
        "blocks_total": 5000,
        "bytes_written": 7_000_000,
        "seconds": 0.5,
        "pause_seconds": 0.01,
    }
    answers += [
        (202, {"id": "op-1", "state": "pending"}),
        (200, ATTACHED),
        (200, {"id": "op-1", "state": "running"}),
        (200, {"id": "op-1", "state": "succeeded", "result": result}),
    ]
    assert "generation 4: 1,200 of 5,000 blocks, 7.0 MB written in 0.50 s" in run("checkpoint", "save")
    assert [(method, path) for method, path, _, _ in asked] == [
        ("POST", "/checkpoint?wait=0"),
        ("GET", "/train/status"),
        ("GET", "/checkpoint/operations/op-1?wait=30"),
        ("GET", "/checkpoint/operations/op-1?wait=30"),
    ]
    assert {key for *_, key in asked} == {"Bearer secret"}


@pytest.mark.parametrize("command", [("checkpoint", "save"), ("rollback", "3")])
def test_what_has_no_worker_says_so_and_waits(api, command):
    answers, _ = api
    done = {"id": "op-1", "state": "succeeded", "result": {"generation": 3, "blocks_changed": 0}}
    answers += [(202, {"id": "op-1", "state": "pending"}), (200, {"worker": None}),
                (200, {"id": "op-1", "state": "pending"}), (200, done)]  # fmt: skip
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.stderr.splitlines() == [
        "hogwild: op-1 waits for a worker: no worker is attached. Ctrl-C ends the waiting; it stays queued until "
        "`hogwild checkpoint cancel op-1`."
    ]
    assert result.exit_code == 0 and "generation 3" in result.stdout and not answers


def test_cancel(run, api):
    answers, asked = api
    answers += [(200, {"id": "op-1", "state": "failed"})]
    assert run("checkpoint", "cancel", "op-1") == "op-1 is cancelled.\n"
    assert asked[0][:2] == ("POST", "/checkpoint/operations/op-1/cancel")


def test_rollback_through_the_api(run, api):
    answers, asked = api
    result = {"generation": 6, "restored": 3, "blocks_changed": 10, "live_blocks_changed": 11}
    answers += [(202, {"id": "op-2", "state": "succeeded", "result": result})] * 2
    text = run("rollback", 3)
    assert "generation 6 has the contents of generation 3" in text
    assert "To undo this: hogwild rollback 5" in text
    assert asked[0][:3] == ("POST", "/checkpoint/rollback?wait=0", b'{"generation":3}')


def test_rollback_to_the_last_generation_puts_live_weights_right_and_can_not_be_undone(run, api):
    answers, _ = api
    result = {"generation": 6, "restored": 6, "blocks_changed": 0, "live_blocks_changed": 11}
    answers += [(202, {"id": "op-2", "state": "succeeded", "result": result})] * 2
    text = run("rollback", 6)
    assert "generation 6 is the last one, and in the files; in the live weights 11 blocks were not." in text
    assert "undo" not in text


def verified(**changes):
    """What the API answers to a verification."""
    return {
        **asdict(VerifyReport(generation=4, blocks_checked=50, live_blocks_checked=40)),
        "weight_version": 8, "live_version": 8, "unsaved": False, "ok": True, "pause_seconds": 0.1, **changes,
    }  # fmt: skip


def test_verify_asks_the_worker_about_live_weights(run, api):
    answers, asked = api

    def answer(**changes):
        ended = (200, {"id": "op-3", "state": "succeeded", "result": verified(**changes)})
        answers.extend([(200, ATTACHED), (202, {"id": "op-3", "state": "running"}), ended])

    answer()
    assert "generation 4: 50 blocks are right on disk, and 40 in the live weights." in run("checkpoint", "verify")
    assert [(method, path.partition("?")[0]) for method, path, *_ in asked] == [
        ("GET", "/train/status"),
        ("POST", "/checkpoint/verify"),
        ("GET", "/checkpoint/operations/op-3"),
    ]
    answer(live={"w": 3}, live_version=10)
    text = run("checkpoint", "verify")
    assert "steps that are not saved (weight version 10, saved 8): 3 of their 40 blocks differ, as they should" in text
    answer(live={"w": 3}, live_version=10)
    found = json.loads(run("checkpoint", "verify", "--json"))
    assert (found["compared"], found["unsaved"], found["ok"]) == (["disk", "live"], True, True)
    answer(live={"w": 3})
    with pytest.raises(CheckpointError, match="No step was counted"):
        run("checkpoint", "verify")
    answer(disk={"w": 3})
    assert run("checkpoint", "verify", "--json").startswith("exit 1")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ((200, {"worker": None}), "no worker is attached"),
        ((200, {"worker": {"alive": False, "attached": True}}), "no worker is attached"),
        ((200, {"worker": {"alive": True, "attached": False}}), "no worker is attached"),
        ((503, {"detail": "Redis is away."}), "Redis is away"),
        (None, "No API answers"),
    ],
)
def test_verify_without_a_worker_compares_the_disk_and_says_so(run, api, directory, monkeypatch, status, reason):
    monkeypatch.setenv("HOGWILD_CHECKPOINT_DIR", str(directory))
    if status is None:
        monkeypatch.setenv("HOGWILD_API_PORT", "1")
    else:
        api[0].append(status)
    text = run("checkpoint", "verify")
    assert "blocks are right on disk. Live weights were not compared: " in text
    assert reason in text


def test_errors_of_the_api_are_shown(run, api):
    answers, _ = api
    answers += [(422, {"title": "x", "detail": "There is no generation 9 to roll back to."})]
    with pytest.raises(HogwildError, match="no generation 9"):
        run("rollback", 9)
    answers += [(202, {"id": "o", "state": "failed", "error": {"message": "the disk is full"}})] * 2
    with pytest.raises(CheckpointError, match="the disk is full"):
        run("checkpoint", "save")
    answers += [(200, b"<html>")]
    with pytest.raises(HogwildError, match="without JSON"):
        run("checkpoint", "save")


def test_no_api(run, monkeypatch):
    monkeypatch.setenv("HOGWILD_API_PORT", "1")
    with pytest.raises(ServiceUnavailable, match="is 'hogwild up' running"):
        run("checkpoint", "save")
