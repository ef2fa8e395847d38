"""A public host: TLS in front, everything replaced under load, and a backup that brings the jobs back."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.production.host import Host
from tests.waiting import until

# The first test builds the images.
pytestmark = pytest.mark.timeout(900)

OURS = ("api", "worker", "worker-maintenance", "beat", "flower")
EVERY_SECONDS = 0.05


def test_the_front(host: Host) -> None:
    answer = host.http.get("/health/ready")
    assert answer.json()["status"] == "ok"
    assert "max-age" in answer.headers["strict-transport-security"]
    plain = httpx.get(f"http://localhost:{host.http_port}/health/ready")
    assert plain.is_redirect
    assert plain.headers["location"].startswith("https://")
    with host.client() as stranger:
        del stranger.headers["Authorization"]
        assert stranger.get("/api/jobs").status_code == 401


def test_nothing_else_is_published_and_the_front_reaches_no_server(host: Host) -> None:
    published = {
        (service, binding["HostIp"])
        for service in ("caddy", "worker", "worker-maintenance", "beat", "flower", "postgres", "redis")
        for bindings in host.inspect(service)["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    assert published == {("caddy", "0.0.0.0"), ("caddy", "::"), ("flower", "127.0.0.1")}
    assert '"HostPort"' not in host.compose("ps", "--format", "json", "api")
    assert len(host.containers("api")) == 2
    may = host.inspect("caddy")["HostConfig"]
    assert (may["ReadonlyRootfs"], may["CapDrop"]) == (True, ["ALL"])
    assert list(host.inspect("caddy")["NetworkSettings"]["Networks"]) == [f"{host.project}_default"]


class Load:
    """POSTs, 20 a second, each waited for by nobody else."""

    def __init__(self, host: Host) -> None:
        self.accepted: list[str] = []
        self.failed: list[str] = []
        self._http, self._enough = host.client(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._clock = threading.Thread(target=self._tick)

    def _tick(self) -> None:
        while not self._enough.wait(EVERY_SECONDS):
            self._threads.append(threading.Thread(target=self._post))
            self._threads[-1].start()

    def _post(self) -> None:
        try:
            answer = self._http.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0.01}})
            answer.raise_for_status()
            self.accepted.append(answer.json()["id"])
        except httpx.HTTPError as error:
            self.failed.append(repr(error))

    def __enter__(self) -> "Load":
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in (self._clock, *self._threads):
            thread.join()
        self._http.close()


def test_every_service_is_replaced_under_load(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    before = {service: host.containers(service) for service in OURS}
    long = host.create("sleep", {"seconds": 50, "steps": 500})
    until(lambda: host.job(long)["status"] == "running", "the long job runs")
    first = host.job(long)["worker"]
    began = time.monotonic()
    with Load(host) as load:
        done = host.script("roll.sh")
        assert done.returncode == 0, done.stderr + host.logs("caddy", "api")[-3000:]
    seconds = time.monotonic() - began
    after = {service: host.containers(service) for service in OURS}
    assert not load.failed, f"{load.failed}\n{host.logs('caddy')[-3000:]}"
    assert {name: len(ids) for name, ids in after.items()} == {name: len(ids) for name, ids in before.items()}
    assert not any(before[service] & after[service] for service in OURS)

    open_jobs = "SELECT count(*) FROM jobs WHERE finished_at IS NULL"
    until(lambda: host.sql(open_jobs)[0]["count"] == 0, "all jobs are over", seconds=90)
    [told] = host.sql("SELECT count(*), count(*) FILTER (WHERE status = 'succeeded' AND attempt = 1) AS well FROM jobs")
    assert told["well"] == told["count"] >= len(load.accepted)
    assert host.job(long)["worker"] != first  # handed back, uncounted
    with capsys.disabled():
        print(f"\n    {len(load.accepted)} POSTs in {seconds:.0f} s of replacing, {len(load.failed)} failed")


def test_what_does_not_start_replaces_nothing(host: Host) -> None:
    before = host.containers("api")
    # A mistake that the migration, which runs first, does not notice.
    done = host.script("roll.sh", "api", API_KEYS="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The new api is not healthy" in done.stderr
    assert "API_KEYS must be set" in done.stdout + done.stderr
    assert host.containers("api") == before
    assert host.http.get("/health/ready").status_code == 200


def test_a_roll_that_is_broken_off_leaves_what_was(host: Host) -> None:
    before = host.containers("api")
    with host.begin("roll.sh", "api", API_CPUS="0.05") as roll:  # long until they are healthy
        until(lambda: len(host.containers("api")) == 4, "new ones are there", seconds=90)
        os.killpg(roll.pid, signal.SIGINT)
        roll.communicate(timeout=90)
    assert roll.returncode
    assert host.containers("api") == before
    # As if it had been killed instead, and had begun to end the old ones: one is stopped, and there are too many.
    host.compose("up", "--detach", "--no-deps", "--no-recreate", "--wait", "--scale", "api=4", "api")
    subprocess.run(["docker", "stop", min(before)], check=True, capture_output=True)
    done = host.script("roll.sh", "api", FILE_RETENTION_DAYS="29")
    assert done.returncode == 0, done.stdout + done.stderr
    now = host.containers("api")
    assert len(now) == 2
    for container in now:
        inspect = ("docker", "inspect", "--format", "{{.State.Health.Status}} {{.Config.Env}}", container)
        told = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout
        assert told.startswith("healthy")
        assert "FILE_RETENTION_DAYS=29" in told


def cleaned(host: Host) -> str:
    return host.execute("worker", "python", "scripts/trigger_cleanup_manual.py", "cleanup_old_files", "--json")


def test_a_backup_brings_jobs_and_files_back(host: Host, tmp_path: Path) -> None:
    file_id = host.upload("a.txt", b"one two two")
    over = host.finished(host.create("text_report", {"file_id": file_id}))
    in_a_month = (datetime.now(UTC) + timedelta(days=30)).isoformat()
    later = host.create("text_report", {"file_id": file_id}, run_at=in_a_month)
    running = host.create("sleep", {"seconds": 30, "steps": 300})
    until(lambda: host.job(running)["status"] == "running", "a job runs")

    with Load(host) as load:
        backup = host.script("backup.sh", str(tmp_path / "backup"))
        assert backup.returncode == 0, backup.stderr
    assert not load.failed, load.failed
    assert (tmp_path / "backup" / "database.dump").stat().st_mode & 0o077 == 0
    # Not into a stack that is in use.
    refused = host.script("restore.sh", str(tmp_path / "backup"))
    assert refused.returncode == 1
    assert "has a database already" in refused.stderr

    again = host.script("backup.sh", str(tmp_path / "backup"))
    assert (again.returncode, again.stderr) == (1, f"{tmp_path / 'backup'} is there already.\n")

    # Of the lost database only its mark is left.
    assert "skipped" not in cleaned(host)
    host.execute("worker", "find", "/data/files", "-type", "f", "!", "-name", "jobstack-owner", "-delete")
    host.compose("down", "--timeout", "5")
    subprocess.run(["docker", "volume", "rm", f"{host.project}_postgres"], check=True, capture_output=True)
    restored = host.script("restore.sh", str(tmp_path / "backup"))
    assert restored.returncode == 0, restored.stderr
    host.up()

    def job(job_id: str) -> Callable[[], bool]:
        return lambda: host.job(job_id)["status"] == "succeeded"

    assert host.job(over["id"]) == over
    assert host.job(later)["status"] == "queued"
    assert host.http.get(f"/api/files/{file_id}/content").content == b"one two two"
    until(job(running), "the job that was running runs again", seconds=90)
    assert host.job(running)["attempt"] == 2
    open_jobs = f"SELECT count(*) FROM jobs WHERE finished_at IS NULL AND id <> '{later}'"
    until(lambda: host.sql(open_jobs)[0]["count"] == 0, "what was waiting runs", seconds=60)
    # The house-keeping takes the files for its own, and deletes none.
    assert "skipped" not in cleaned(host)
    assert host.http.get(f"/api/files/{file_id}/content").status_code == 200
