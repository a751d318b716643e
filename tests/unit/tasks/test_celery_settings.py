"""Settings without which Celery loses or repeats jobs."""

import subprocess
import sys

import pytest

from hogwild.errors import AlreadyAttached
from hogwild.tasks.app import make_app
from hogwild.tasks.progress import send_progress


@pytest.mark.parametrize("limit_s", [60.0, 6 * 3600.0, 7 * 86400.0])
def test_no_running_job_outlasts_the_visibility_timeout(settings, limit_s):
    conf = make_app(settings.model_copy(update={"job_time_limit_s": limit_s})).conf
    timeouts = (conf.broker_transport_options["visibility_timeout"],
                conf.result_backend_transport_options["visibility_timeout"], conf.visibility_timeout)
    assert len(set(timeouts)) == 1 and timeouts[0] > conf.task_time_limit > limit_s


def test_a_job_is_acknowledged_when_it_ended_and_not_killed_with_the_connection(settings):
    conf = make_app(settings).conf
    assert conf.task_acks_late and conf.task_reject_on_worker_lost and conf.worker_deduplicate_successful_tasks
    assert conf.result_backend_always_retry and not conf.worker_cancel_long_running_tasks_on_connection_loss
    assert (conf.worker_pool, conf.worker_concurrency, conf.worker_prefetch_multiplier) == ("prefork", 1, 1)
    assert conf.worker_pool_start_method == "spawn" and conf.accept_content == ["json"]


def test_two_models_have_two_queues(settings):
    a = make_app(settings.model_copy(update={"served_model_name": "a"})).conf
    b = make_app(settings.model_copy(update={"served_model_name": "b"})).conf
    assert a.task_default_queue == "train.a" != b.task_default_queue


@pytest.mark.parametrize("module", ["hogwild.api.app", "hogwild.tasks.app", "hogwild.tasks.schedule", "hogwild.client",
                                    "hogwild.cli.jobs"])
def test_services_without_a_gpu_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_flower_sees_does_not_end_a_job():
    class Task:
        def send_event(self, *args, **kwargs):
            raise ConnectionError("Redis went away")

    send_progress(Task(), 1, 2)


def test_a_runtime_that_did_not_start_takes_no_job(monkeypatch):
    from hogwild.tasks import runtime, worker

    class Refused:
        def __init__(self, *args, **kwargs):
            pass

        def start(self):
            raise AlreadyAttached("a worker on another host serves this model")

    monkeypatch.setattr(runtime, "Runtime", Refused)
    for _ in range(2):
        with pytest.raises(AlreadyAttached):
            worker.runtime()
