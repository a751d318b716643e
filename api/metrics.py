"""Prometheus text of /metrics, made from the ledger when it is asked for.

No label has a job's id or a key's name: the number of series does not grow with use.
"""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hogwild.api.service import Service
from hogwild.tasks.ledger import now
from hogwild.tasks.metrics import STEP_BUCKETS, counters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {  # name in Redis → (metric, help)
    "jobs_accepted": ("hogwild_jobs_accepted", "Jobs that were accepted."),
    "jobs_republished": ("hogwild_jobs_republished", "Messages that the reconciler published again."),
    "steps_applied": ("hogwild_steps_applied", "Optimizer steps in the weights."),
    "steps_dropped": ("hogwild_steps_dropped", "Steps that were not finite: nothing of them is in the weights."),
    "steps_interrupted": ("hogwild_steps_interrupted", "Steps that a dying worker left; never repeated."),
    "tokens_trained": ("hogwild_tokens_trained", "Tokens of applied steps."),
    "syncs": ("hogwild_syncs", "Checkpoint generations that were written, by rollbacks too."),
    "syncs_failed": ("hogwild_syncs_failed", "Syncs that failed; what they would have saved stays unsaved."),
    "sync_bytes": ("hogwild_sync_written_bytes", "Bytes that syncs and rollbacks wrote into the checkpoint."),
    "sync_undo_bytes": ("hogwild_sync_undo_bytes", "Bytes that syncs and rollbacks wrote into undo logs."),
    "sync_blocks": ("hogwild_sync_changed_blocks", "4 KB blocks that syncs and rollbacks changed."),
    "sync_seconds": ("hogwild_sync_seconds", "Seconds spent in syncs and rollbacks."),
    "sync_pause_seconds": ("hogwild_sync_pause_seconds", "Seconds for which training waited for syncs and rollbacks."),
}
# Of hogwild.gpu_worker.lifecycle (which imports torch), and what an attached worker is busy with.
WORKER_STATES = ("detached", "waiting", "attaching", "verified", "training", "syncing", "lost", "refused")
ATTACHED = ("verified", "training", "syncing")


class _Snapshot(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> list[Metric]:
        return self.metrics


def render(service: Service) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(_collect(service)))
    return generate_latest(registry)


def _collect(service: Service) -> list[Metric]:
    ledger, client = service.ledger, service.client
    states = ledger.counts()
    counts = counters(client, service.settings.model_name)
    metrics: list[Metric] = []

    jobs = GaugeMetricFamily("hogwild_jobs", "Jobs in the ledger.", labels=["state"])
    for state, n in states.items():
        jobs.add_metric([state], n)
    finished = CounterMetricFamily("hogwild_jobs_finished", "Jobs that ended, by how.", labels=["state"])
    for state in ("succeeded", "failed", "cancelled"):
        finished.add_metric([state], counts.get(f"jobs_{state}", 0))
    operations = CounterMetricFamily("hogwild_operations", "Syncs, rollbacks and so on, on demand, by end.",
                                     labels=["state"])
    for state in ("succeeded", "failed"):
        operations.add_metric([state], counts.get(f"operations_{state}", 0))
    metrics += [jobs, finished, operations]
    for name, (metric, text) in _COUNTERS.items():
        metrics.append(CounterMetricFamily(metric, text, value=counts.get(name, 0)))

    steps = counts.get("steps_applied", 0)
    buckets = [(bound, counts.get(f"step_seconds_le_{bound}", 0)) for bound in STEP_BUCKETS]
    seconds = HistogramMetricFamily("hogwild_step_seconds", "Time of a step.")
    seconds.add_metric([], [*buckets, ("+Inf", steps)], counts.get("step_seconds_sum", 0))
    metrics.append(seconds)

    def gauge(name: str, text: str, value: float) -> None:
        metrics.append(GaugeMetricFamily(name, text, value=value))

    pipe = client.pipeline(transaction=False)
    for job_id in client.zrange(ledger.keys("state", "queued"), 0, -1):
        pipe.hmget(ledger.keys("job", job_id.decode()), "paused", "queued_at")
    queued = pipe.execute()
    waiting = [float(queued_at) for paused, queued_at in queued if paused == b"0" and queued_at]
    gauge("hogwild_queue_depth", "Jobs that wait for the worker.", len(waiting))
    gauge("hogwild_queue_paused", "Jobs that wait until they are resumed.", sum(paused == b"1" for paused, _ in queued))
    gauge("hogwild_queue_limit", "Jobs that may wait, paused ones among them.", service.settings.queue_limit)
    clock = now(client)
    gauge("hogwild_queue_age_seconds", "How long the job that has waited longest for the worker has waited.",
          max(0.0, clock - min(waiting)) if waiting else 0.0)
    if "loss_last" in counts:
        gauge("hogwild_loss", "Loss of the last applied step.", counts["loss_last"])
    worker = service.registry.worker() or {}
    version = worker.get("weight_version", counts.get("weight_version"))
    if version is not None:
        gauge("hogwild_weight_version", "Version of the live weights: optimizer steps applied.", version)
    dirty = service.dirty.state()
    gauge("hogwild_unsaved_steps", "Steps that no checkpoint generation holds.", dirty.steps)
    gauge("hogwild_unsaved_seconds", "Age of the oldest unsaved step.",
          max(0.0, clock - dirty.oldest_at) if dirty.oldest_at else 0.0)
    if dirty.generation is not None:
        gauge("hogwild_checkpoint_generation", "Newest checkpoint generation.", dirty.generation)
    alive = bool(worker.get("alive"))
    gauge("hogwild_worker_up", "1: the worker reports.", 1 if alive else 0)
    gauge("hogwild_worker_attached", "1: the worker reports and holds vLLM's weights.",
          1 if alive and worker.get("state") in ATTACHED else 0)
    attached = GaugeMetricFamily("hogwild_worker_state", "1 at the state that the worker is in.",
                                 labels=["state"])
    for name in WORKER_STATES:
        attached.add_metric([name], 1 if alive and worker.get("state") == name else 0)
    metrics.append(attached)
    return metrics
