"""What happens around each step of a job: the governor is told what is work and what is not."""

from types import SimpleNamespace
from typing import Any

from hogwild.gpu_worker.control import StepReport
from hogwild.tasks.control import JobControl
from hogwild.tasks.ledger import Lease


class Told(list[str]):
    """Notes every call of every method, by name; answers nothing."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def __getattr__(self, method: str) -> Any:
        return lambda *_, **__: self.log.append(f"{self.name}.{method}")


def test_tokens_of_a_step_that_was_dropped_are_not_trained(monkeypatch) -> None:
    monkeypatch.setattr("hogwild.tasks.control.send_progress", lambda *_, **__: None)
    weights = SimpleNamespace(version=3, set_version=lambda _: None)
    live = SimpleNamespace(governor=Told([], ""), saver=Told([], ""), attachment=SimpleNamespace(weights=weights))
    runtime, tokens = Told([], ""), []
    runtime.ledger = SimpleNamespace(applied=lambda *_, **given: tokens.append(given["tokens"]))
    lease = Lease(**dict.fromkeys(Lease.__dataclass_fields__) | {"first_step": 0, "seconds": 0.0})
    JobControl(runtime, live, None, lease, n_steps=1).after_step(StepReport(
        step=0, n_steps=1, loss=float("nan"), tokens=2, loss_tokens=1, seconds=0.1, learning_rate=0.1, grad_norm=None,
        nonfinite=(), applied=False))  # fmt: skip
    assert tokens == [0]


def test_a_steps_work_is_told_from_what_happens_between_steps(monkeypatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("hogwild.tasks.control.send_progress", lambda *_, **__: None)
    weights = SimpleNamespace(version=3, begin=lambda: log.append("weights.begin"), applied=lambda: 4)
    live = SimpleNamespace(governor=Told(log, "governor"), saver=Told(log, "saver"),
                           attachment=SimpleNamespace(weights=weights))
    runtime = Told(log, "runtime")
    runtime.settings = SimpleNamespace(job_time_limit_s=100.0)
    runtime.ledger, runtime.dirty = Told(log, "ledger"), Told(log, "dirty")
    lease = Lease(**dict.fromkeys(Lease.__dataclass_fields__) | {"first_step": 0, "seconds": 0.0})
    control = JobControl(runtime, live, None, lease, n_steps=1)

    control.before_step(0)
    control.between_micro_steps()
    control.after_step(StepReport(step=0, n_steps=1, loss=1.0, tokens=2, loss_tokens=1, seconds=0.1,
                                  learning_rate=0.1, grad_norm=1.0, nonfinite=(), applied=True))

    # A sync or a pause between steps is over when work begins; the ledger and the prefix cache come after its end.
    order = [log.index(name) for name in (
        "runtime.between_steps", "governor.begin_work", "weights.begin", "governor.yield_point",
        "governor.worked", "ledger.applied", "runtime.step_done")]  # fmt: skip
    assert order == sorted(order)
