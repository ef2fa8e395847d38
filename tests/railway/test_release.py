"""A release of the whole project, in the order in which things happen to one."""

import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.stack import ROOT
from tests.railway import config
from tests.railway.conftest import Seen
from tests.railway.rehearsal import Client, Rehearsal, docker
from tests.waiting import until

pytestmark = pytest.mark.timeout(900)

WORKERS = ("worker", "worker-maintenance")
# A release deploys all at once; only the API waits for the migration.
EARLY = (*WORKERS, "beat", "flower")
HEALTH = {"Host": "healthcheck.railway.app"}
SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def release(project: Rehearsal, seen: Seen) -> Rehearsal:
    """All services run, deployed at once into a network without names, and the API after its migration."""
    for service in EARLY:
        project.deploy(service)
    # Two at once: a redeploy that was asked for twice.
    for migration in ("migration-1", "migration-2"):
        project.pre_deploy(migration)
    # Three looks: the first one alone might be all that somebody takes.
    early = dict.fromkeys((*EARLY, "migration-1", "migration-2"), 6)
    until(lambda: Counter(early) <= project.asked_in_vain(), "all have asked for names in vain", seconds=90)
    began = time.monotonic()
    project.tell_names()
    codes = [project.ended(migration) for migration in ("migration-1", "migration-2")]
    assert codes == [0, 0], project.output("migration-1") + project.output("migration-2")
    seen.steps["migration twice at once, after names came"] = f"exit codes 0 and 0, {time.monotonic() - began:.1f} s"
    project.deploy("api")
    until(lambda: healthy(project.at(8000), "/health/ready"), "the API is ready", seconds=60)
    until(lambda: healthy(project.at(5555), "/healthcheck"), "Flower is healthy", seconds=60)
    seen.steps["names that come late"] = "all six waited, none ended"
    seen.steps["healthcheck.railway.app"] = f"api and flower say 200, {time.monotonic() - began:.1f} s after names came"
    return project


def healthy(address: str, path: str) -> bool:
    try:
        return httpx.get(address + path, headers=HEALTH, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def client(release: Rehearsal) -> Iterator[Client]:
    with httpx.Client(
        base_url=release.at(8000), headers={"Authorization": f"Bearer {config.SECRET}"}, timeout=10
    ) as http:
        yield Client(http)


def test_nobody_ended_while_names_were_missing(release: Rehearsal) -> None:
    for service in config.OURS:
        state = release.state(service)
        assert state["Running"], release.output(service)
        assert not state["OOMKilled"]


def test_there_is_no_ipv4(release: Rehearsal) -> None:
    for service in config.OURS:
        # Nothing but the heading.
        assert len(release.execute(service, "cat", "/proc/net/route").splitlines()) == 1
        assert not release.inspect(service)["Mounts"], "no disk is shared"


def test_a_worker_has_the_children_that_it_was_told_and_not_one_a_cpu(release: Rehearsal) -> None:
    for service in WORKERS:
        wanted = int(release.variables(service)["WORKER_CONCURRENCY"])
        assert len(docker("top", f"{release.name}-{service}").splitlines()) - 1 == 1 + wanted


def test_keys_are_asked_for(release: Rehearsal) -> None:
    assert httpx.get(release.at(8000) + "/api/jobs").status_code == 401
    assert httpx.get(release.at(5555) + "/api/workers").status_code == 401
    assert httpx.get(release.at(5555) + "/api/workers", auth=("admin", config.SECRET)).status_code == 200


def test_jobs_with_files_end_to_end(release: Rehearsal, client: Client, seen: Seen) -> None:
    began = time.monotonic()
    text = client.upload("story.txt", (SAMPLES / "story.txt").read_bytes(), "text/plain")
    done = client.finished(client.create("text_report", {"file_id": text}))
    assert done["status"] == "succeeded", done
    assert done["result"]["words"] == len((SAMPLES / "story.txt").read_text().split())
    seen.steps["text_report with an upload"] = f"{time.monotonic() - began:.1f} s"
    began = time.monotonic()
    sound = client.upload("speech.wav", (SAMPLES / "speech.wav").read_bytes(), "audio/wav")
    done = client.finished(client.create("waveform", {"file_id": sound, "chunk_seconds": 3}))
    assert done["status"] == "succeeded", done
    assert len(done["result"]["silences"]) == 3
    image = client.http.get(f"/api/files/{done['result']['image_file_id']}/content")
    assert image.content.startswith(b"\x89PNG")
    seen.steps["waveform, and its image downloaded"] = f"{time.monotonic() - began:.1f} s"
    for service in config.OURS:
        seen.services[service]["memory"] = release.memory(service)


def test_the_lines_of_the_page(release: Rehearsal, client: Client) -> None:
    """The last step of docs/railway.md, typed as it stands there."""
    page = (ROOT / "docs/railway.md").read_text()
    ready, post = re.findall(r"^curl .*", page, re.MULTILINE)

    def typed(line: str) -> Any:
        own = {"API": release.at(8000), "KEY": config.SECRET}
        done = subprocess.run(["sh", "-c", line], env=os.environ | own, check=True, capture_output=True)
        return json.loads(done.stdout)

    assert typed(ready) == json.loads(ready.partition("# ")[2])
    assert client.finished(typed(post)["id"])["status"] == "succeeded"


def test_a_migration_that_fails_stops_the_release(release: Rehearsal, client: Client, seen: Seen) -> None:
    before = release.sql("SELECT version_num FROM alembic_version")
    (release.folder / "broken.py").write_text(
        "from alembic import op\n"
        f"revision, down_revision = '9999', '{before}'\n"
        "def upgrade():\n"
        "    op.execute('CREATE TABLE half_way ()')\n"
        "    op.execute('SELECT 1 FROM no_such_table')\n"
    )
    # The next release's code, which needs that revision: it would look no further otherwise.
    code_now = release.execute("api", "cat", "app/database.py")
    code_next = code_now.replace(f'SCHEMA_REVISION = "{before}"', 'SCHEMA_REVISION = "9999"')
    assert code_next != code_now
    (release.folder / "database.py").write_text(code_next)
    files = {"broken.py": "/app/migrations/versions/9999_broken.py", "database.py": "/app/app/database.py"}
    release.pre_deploy("migration-3", mounts=files)
    code = release.ended("migration-3")
    assert code != 0
    assert "no_such_table" in "".join(release.output("migration-3"))
    assert release.sql("SELECT version_num FROM alembic_version") == before
    assert release.sql("SELECT to_regclass('half_way') IS NULL") == "t"
    # The old release goes on.
    assert healthy(release.at(8000), "/health/ready")
    assert client.finished(client.create("sleep", {"seconds": 0}))["status"] == "succeeded"
    seen.steps["a migration that fails"] = f"exit code {code}, the old schema and release stay"


def test_sigterm_in_the_middle_of_a_job(release: Rehearsal, client: Client, seen: Seen) -> None:
    job_id = client.create("sleep", {"seconds": 3600, "steps": 1000})
    until(lambda: client.job(job_id)["status"] == "running", "the job runs")
    code, seconds = release.stop("worker")
    note(seen, "worker", code, seconds)
    job = client.job(job_id)
    assert code == 0
    assert (job["status"], job["attempt"]) == ("queued", 0), job
    seen.steps["SIGTERM in the middle of a job"] = f"queued again, no attempt counted, {seconds:.0f} s"
    release.start("worker")
    until(lambda: client.job(job_id)["status"] == "running", "it runs again", seconds=60)
    client.http.post(f"/api/jobs/{job_id}/cancel")
    assert client.finished(job_id)["status"] == "cancelled"


def test_the_others_end_by_sigterm(release: Rehearsal, seen: Seen) -> None:
    # beat and flower have nothing to finish: Railway kills them at once.
    for service in ("api", "worker-maintenance"):
        code, seconds = release.stop(service)
        note(seen, service, code, seconds)
        assert code == 0, release.output(service)


def test_the_logs_are_json_on_stdout(release: Rehearsal) -> None:
    for service in config.OURS:
        written, errors = release.output(service)
        assert errors == "", service
        assert written
        for line in written.splitlines():
            record = json.loads(line)
            assert record["level"] in ("debug", "info", "warning"), line
            assert record["message"]


def note(seen: Seen, service: str, code: int, seconds: float) -> None:
    seen.services[service] |= {"code": str(code), "seconds": f"{seconds:.1f} s"}
