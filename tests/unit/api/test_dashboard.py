"""The Grafana dashboard asks for metrics that exist."""

import json
import re
from pathlib import Path

from fastapi.testclient import TestClient

from hogwild.api.app import create_app
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.metrics import SyncFigures, record_sync
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import Registry

DASHBOARD = Path(__file__).parents[3] / "docker" / "grafana-dashboard.json"


def test_every_metric_of_the_dashboard_is_served(settings, redis_client):
    # Given a service in which everything has happened once
    ledger = Ledger(redis_client, settings)
    job_id, _ = ledger.submit(pack([Sample([1], [2])]), {})
    Registry(redis_client, "tiny").register_worker("w", "h")
    lease = ledger.claim(job_id, "w")
    ledger.begin_step(lease, 0)
    ledger.applied(lease, 0, 1, loss=0.5, tokens=1, seconds=0.1)
    Dirty(redis_client, "tiny").clear(1, 1)
    record_sync(redis_client, "tiny", SyncFigures(bytes_written=4096, seconds=0.5, pause_seconds=0.1))
    with TestClient(create_app(settings)) as http:
        served = http.get("/metrics").text
    # When the dashboard's queries name metrics
    wanted = {name for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
              for name in re.findall(r"hogwild_\w+", target["expr"])}
    # Then all of them are there, with the figures
    missing = {name for name in wanted if f"\n{name}" not in served}
    assert wanted and not missing
    assert "hogwild_sync_written_bytes_total 4096.0" in served and "hogwild_sync_pause_seconds_total 0.1" in served
