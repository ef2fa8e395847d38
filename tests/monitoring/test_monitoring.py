"""The profile `monitoring` beside a real stack: every query of the dashboards has data, alerts fire when they should.

`make monitoring-test`. Debian's packages stand in for the images; Grafana itself is not started.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import engine
from tests.e2e.stack import ROOT, Stack
from tests.servers import free_port
from tests.waiting import until

__all__ = ["engine"]
pytestmark = pytest.mark.timeout(1500)

IMAGE = "jobstack-monitoring-test"
HERE = Path(__file__).parent
DASHBOARDS = sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))
# A machine in a machine has no file system of its own.
MAY_BE_EMPTY = "node_filesystem"


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    subprocess.run(["docker", "build", "--quiet", "--tag", IMAGE, str(HERE)], check=True, capture_output=True)
    return IMAGE


class Monitored:
    """A stack, and its Prometheus."""

    def __init__(self, stack: Stack, prometheus: httpx.Client) -> None:
        self.stack, self._http = stack, prometheus

    def query(self, text: str) -> list[dict[str, Any]]:
        answer = self._http.get("/query", params={"query": text})
        assert answer.status_code == 200, (text, answer.text)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def down(self) -> list[str]:
        """Targets that don't answer, with the reason."""
        targets = self._http.get("/targets").json()["data"]["activeTargets"]
        return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"] + (
            [] if len(targets) == 4 else [f"{len(targets)} targets"]
        )

    def firing(self) -> set[str]:
        alerts = self._http.get("/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until_firing(self, wanted: set[str], *, seconds: float) -> None:
        try:
            until(lambda: self.firing() >= wanted, "alerts fire", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: not {wanted - self.firing()}") from None


@pytest.fixture(scope="module")
def monitored(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    port = free_port()
    stack = Stack(
        tmp_path_factory.mktemp("monitoring"),
        files=("tests/monitoring/compose.yml",),
        PROMETHEUS_PORT=str(port),
    )
    exporters = ("prometheus", "redis-exporter", "postgres-exporter", "node-exporter", "blackbox-exporter")
    stack.http.headers["Authorization"] = f"Bearer {stack.secrets['API_KEYS'].partition(':')[2]}"
    try:
        stack.up("api", "worker", "worker-maintenance", "beat")
        stack.compose("--profile", "monitoring", "up", "--detach", "--wait", "--no-deps", *exporters)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as prometheus:
            yield Monitored(stack, prometheus)
    finally:
        stack.compose("--profile", "*", "rm", "--stop", "--force", *exporters)
        stack.down()


def test_rules_and_configuration(image: str) -> None:
    config = "touch /tmp/api-key; promtool check config ../../monitoring/prometheus.yml"
    checks = f"{config} && promtool test rules rules.test.yml"
    command = ["docker", "run", "--rm", "--volume", f"{ROOT}:/jobstack:ro", "--workdir", "/jobstack/tests/monitoring"]
    done = subprocess.run([*command, image, "sh", "-c", checks], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboards_has_data(monitored: Monitored) -> None:
    stack = monitored.stack
    # Counters are seen to grow only from the first scrape on.
    until(lambda: not monitored.down(), "all targets answer", seconds=120)
    jobs = [stack.create("flaky", {"failures": 9, "error": "permanent"}) for _ in range(9)]
    jobs += [stack.create("sleep", {"seconds": 0}) for _ in range(9)]
    jobs += [stack.create("flaky", {"failures": 1, "error": "transient"})]
    for job_id in jobs:
        stack.finished(job_id)
    queries = [
        target["expr"]
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]
    assert len(queries) > 30
    empty = [query for query in queries if MAY_BE_EMPTY not in query]

    def all_have_data() -> bool:
        empty[:] = [query for query in empty if not monitored.query(query)]
        return not empty

    try:
        until(all_have_data, "every query has data", seconds=120)
    except AssertionError as error:
        raise AssertionError(f"{error}: {empty}") from None
    [finished] = monitored.query('sum(max by (kind, status) (jobstack_jobs_finished_total{kind="flaky"}))')
    assert finished["value"][1] == "10"


def test_alerts_fire_on_a_broken_stack(monitored: Monitored) -> None:
    assert monitored.firing() == set()
    monitored.stack.compose("stop", "beat", "worker")
    # Nine failed jobs are there already.
    wanted = {"BeatSilent", "NoConsumer", "FailureRate"}
    monitored.until_firing(wanted, seconds=540)
    monitored.stack.compose("stop", "redis")
    monitored.until_firing({"PartAway"}, seconds=200)
    monitored.stack.compose("start", "redis", "beat", "worker")
    gone = {"BeatSilent", "NoConsumer", "PartAway"}
    until(lambda: not gone & monitored.firing(), "they end", seconds=200)
