"""A Celery worker for the fault tests: the real ledger and a tiny deterministic model, eight float64s in a file.

It uses the ledger as the GPU worker does: lock, register, settle and reconcile at the start, claim with the version of
the weights, begin → write → applied. A step replaces the file atomically, so it is in the weights or it is not.

    celery -A fault_worker worker -c 1
"""

import fcntl
import os
import threading
import time

from celery import signals
from tiny_model import read_weights, update, write_weights

from hogwild.config import Settings
from hogwild.errors import Conflict
from hogwild.tasks.app import ATTACH_TIMEOUT_S, TICK, TRAIN, make_app
from hogwild.tasks.connections import redis_url, worker_client
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.progress import send_progress
from hogwild.tasks.registry import ModelInfo, Registry

STEP_S = float(os.environ.get("FAULT_STEP_S", "0.03"))
HEARTBEAT_S = 0.5

settings = Settings()
app = make_app(settings)
app.conf.include = []
app.conf.worker_proc_alive_timeout = ATTACH_TIMEOUT_S


class Worker:
    """What the child owns."""

    def __init__(self) -> None:
        self.path = settings.model_runtime_dir / "weights"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.client = worker_client(redis_url(settings))
        self.ledger = Ledger(self.client, settings)
        self.registry = Registry(self.client, settings.model_name)
        self.id = f"{os.getpid()}-{time.time_ns()}"
        # The kernel lets the lock go with the process, however it died: who holds it is alone with the weights.
        self.lock = (settings.model_runtime_dir / "worker.lock").open("a")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.registry.register_worker(self.id, "host")
        self.registry.publish_model(ModelInfo(served_model_name=settings.model_name, model_path="-", vocab_size=1000,
                                              max_model_len=1000))
        self.beat()
        self.ledger.reconcile(self.id, grace_s=0)
        threading.Thread(target=self._beats, daemon=True).start()

    def beat(self) -> None:
        self.registry.heartbeat(self.id, {"host": "host", "pid": os.getpid(), "state": "attached",
                                          "weight_version": read_weights(self.path)[0]})

    def _beats(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            self.beat()

    def train(self, task: object, job_id: str) -> str:
        version, _ = read_weights(self.path)
        lease = self.ledger.claim(job_id, self.id, weights_version=version)
        if lease is None:
            return "not mine"
        ids = list(self.ledger.samples(lease)[0].continuation_ids)
        steps = lease.config["steps"]
        self.ledger.planned(lease, steps)
        try:
            for step in range(lease.first_step, steps):
                wanted = self.ledger.requested(job_id)
                if wanted == "cancel":
                    self.ledger.finish(lease, "cancelled")
                    return "cancelled"
                if wanted == "pause" and self.ledger.park(lease):
                    return "paused"
                version, weights = read_weights(self.path)
                self.ledger.begin_step(lease, step, weight_version=version)
                time.sleep(STEP_S / 2)
                write_weights(self.path, version + 1, update(weights, ids, step))
                time.sleep(STEP_S / 2)
                self.ledger.applied(lease, step, version + 1, loss=1.0, tokens=len(ids), seconds=STEP_S)
                send_progress(task, step + 1, steps, loss=1.0, weight_version=version + 1)
            self.ledger.finish(lease, "succeeded")
        except Conflict:
            return "lease lost"
        return "succeeded"


worker: Worker | None = None


@signals.worker_process_init.connect
def start(**_: object) -> None:
    global worker
    worker = Worker()


@app.task(name=TRAIN, bind=True)
def train(self: object, job_id: str) -> str:
    return worker.train(self, job_id)


@app.task(name=TICK, ignore_result=True)
def tick() -> None:
    worker.ledger.reconcile(worker.id, grace_s=2)
