"""`make up` without containers, from outside: a copy of this repository, started, killed, changed and stopped.

The tests are one story in the order of the file: a start costs ten seconds, and a fresh one installs everything first.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.servers import free_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
# The first one installs; every other `make up` gets by with much less.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

PROCESSES = {"api", "worker", "worker-maintenance", "beat", "flower"}
SERVERS = {"postgres", "redis"}


class Clone:
    """A copy of what git knows or would know, with ports of its own and no engine in sight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, symlinks=True, ignore=self._ignore, dirs_exist_ok=True)
        self.api_port, self.flower_port = free_port(), free_port()
        hidden = {
            "DATABASE_URL",
            "REDIS_URL",
            "STORAGE_URL",
            "JOBSTACK_RUN_DIR",
            "LOG_FORMAT",
            "MAKEFLAGS",
            "MAKELEVEL",
        }
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"API_PORT": str(self.api_port), "FLOWER_PORT": str(self.flower_port), "MODE": "native"}

    @staticmethod
    def _ignore(folder: str, names: list[str]) -> set[str]:
        top = {".git", ".venv", ".run", ".env"} if Path(folder) == ROOT else set()
        return {name for name in names if name in top or name.endswith("_cache") or name == "__pycache__"}

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments],
            check=False,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def up(self, **environment: str) -> str:
        done = self.make("up", **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def processes(self) -> dict[str, psutil.Process]:
        """What supervisord started, by name."""

        def status() -> str:
            command = [".venv/bin/supervisorctl", "-c", ".run/supervisord.conf", "status"]
            table = subprocess.run(command, check=False, cwd=self.folder, capture_output=True, text=True).stdout
            # `up` returns when a process is healthy; supervisord calls it running when it has lived for 5 s.
            return "" if "STARTING" in table else table

        table = until(status, "nothing is starting any more")
        return {
            name: psutil.Process(int(pid))
            for name, pid in re.findall(r"^(?:\w+:)?(\S+) +RUNNING +pid (\d+)", table, re.MULTILINE)
        }

    def everything(self) -> list[psutil.Process]:
        """Whatever lives and was started from this folder, supervisord and the children of workers included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def call(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.api_port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def succeeds(self, job_id: str, seconds: float = 30) -> None:
        until(lambda: self.call(f"/api/jobs/{job_id}")["status"] == "succeeded", "the job succeeded", seconds=seconds)

    def job(self) -> str:
        answer = self.call("/api/jobs", {"kind": "text_report", "payload": {"text": "one two two"}})
        return str(answer["id"])


@pytest.fixture(scope="module")
def clone() -> Iterator[Clone]:
    # Not in pytest's folder, which every pytest that starts closes for other users: as root, PostgreSQL runs as one.
    with tempfile.TemporaryDirectory(prefix="jobstack-native-") as folder:
        # A name that shells, URLs and configuration files may stumble over.
        made = Clone(Path(folder) / "my clone's copy")
        yield made
        made.make("down")
        for process in made.everything():
            process.kill()


def test_a_taken_port_is_named_before_anything_is_installed(clone: Clone) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", clone.api_port))
        listener.listen()
        began = time.monotonic()
        done = clone.make("up")
    assert done.returncode != 0
    assert f"Port {clone.api_port} is taken" in done.stdout
    assert f"API_PORT={clone.api_port + 1} make up" in done.stdout
    assert time.monotonic() - began < 10
    assert not (clone.folder / ".venv").exists()


def test_up_starts_everything_and_its_curl_line_works(clone: Clone) -> None:
    output = clone.up()
    assert "A first job succeeded" in output
    assert f"http://127.0.0.1:{clone.api_port}/docs" in output
    assert set(clone.processes()) == PROCESSES | SERVERS
    secrets = (clone.folder / ".env").read_text()
    for name in ("POSTGRES_PASSWORD", "FLOWER_BASIC_AUTH"):
        found = re.search(f"^{name}=(?:admin:)?(.+)$", secrets, re.MULTILINE)
        assert found
        assert found.group(1) not in output
    line = next(line for line in output.splitlines() if line.strip().startswith("curl"))
    answer = subprocess.run(line, check=True, shell=True, cwd=clone.folder, capture_output=True, text=True)  # noqa: S602
    clone.succeeds(json.loads(answer.stdout)["id"])


def test_no_port_can_be_reached_from_outside(clone: Clone) -> None:
    for process in clone.everything():
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1", process.cmdline()


def test_secrets_are_not_in_the_process_list(clone: Clone) -> None:
    password = dict(re.findall(r"^(\w+)=(.+)$", (clone.folder / ".env").read_text(), re.MULTILINE))["REDIS_PASSWORD"]
    assert not [process for process in clone.everything() if password in " ".join(process.cmdline())]
    for path in (clone.folder / ".run").rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o077 and "postgres" not in path.parts:
            assert password not in path.read_text(errors="replace"), path


def test_a_second_up_changes_nothing_and_is_quick(clone: Clone) -> None:
    before, secrets = clone.processes(), (clone.folder / ".env").read_text()
    began = time.monotonic()
    assert "nothing changed" in clone.up()
    assert time.monotonic() - began < 20
    assert clone.processes() == before
    assert (clone.folder / ".env").read_text() == secrets


def test_ps_shows_each_process_and_its_health(clone: Clone) -> None:
    rows = {line.split()[0]: line.split() for line in clone.make("ps").stdout.splitlines()[1:]}
    assert set(rows) == PROCESSES | SERVERS
    assert {(row[1], row[-1]) for row in rows.values()} == {("running", "ok")}


def test_scripts_run_where_the_stack_is(clone: Clone) -> None:
    done = clone.make("run", SCRIPT="""run_job.py text_report --json --payload '{"text": "a b"}'""")
    assert done.returncode == 0, done.stdout
    assert '"words": 2' in done.stdout
    # By hand too, without make and with nothing set.
    for name in ("API_PORT", "FLOWER_PORT", "MODE"):
        assert name in clone.environment
    bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    by_hand = [".venv/bin/python", "scripts/run_job.py", "text_report", "--json", "--payload", '{"text": "a b"}']
    subprocess.run(by_hand, check=True, cwd=clone.folder, env=bare, capture_output=True)


def test_what_is_killed_comes_back(clone: Clone) -> None:
    before = clone.processes()
    for name in ("api", "worker", "redis", "postgres"):
        before[name].send_signal(signal.SIGKILL)
    until(
        lambda: set(clone.processes()) == PROCESSES | SERVERS and clone.processes()["api"] != before["api"],
        "all run again",
        seconds=60,
    )

    def accepted() -> str:
        with contextlib.suppress(OSError):
            return clone.job()
        return ""

    clone.succeeds(until(accepted, "a job is accepted", seconds=60), seconds=60)
    after = clone.processes()
    assert all(after[name] != before[name] for name in ("api", "worker", "redis", "postgres"))
    assert after["beat"] == before["beat"]


def test_changed_settings_reach_the_processes_and_restart_only_them(clone: Clone) -> None:
    before = clone.processes()
    output = clone.up(WORKER_CONCURRENCY="3", LOG_LEVEL="WARNING")
    assert "Restarting app" in output
    after = clone.processes()
    assert {name for name in after if after[name] == before[name]} == SERVERS
    assert after["worker"].environ()["WORKER_CONCURRENCY"] == "3"
    assert after["worker-maintenance"].environ()["WORKER_CONCURRENCY"] == "2"
    assert after["api"].environ()["LOG_LEVEL"] == "WARNING"
    # A person's .env says one thing, the environment another.
    with (clone.folder / ".env").open("a") as file:
        file.write("LOG_LEVEL=ERROR\n")
    clone.up(LOG_LEVEL="INFO")
    assert clone.processes()["api"].environ()["LOG_LEVEL"] == "INFO"
    assert "WORKER_CONCURRENCY" not in clone.processes()["worker"].environ(), "what is set no more is gone"


def test_changed_code_restarts_the_processes(clone: Clone) -> None:
    clone.up()
    before = clone.processes()
    with (clone.folder / "worker" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    assert "Restarting app" in clone.up()
    after = clone.processes()
    assert {name for name in after if after[name] == before[name]} == SERVERS


def test_a_failed_start_says_why(clone: Clone) -> None:
    done = clone.make("up", JOB_HEARTBEAT_SECONDS="25")
    assert done.returncode != 0
    assert "JOB_HEARTBEAT_SECONDS must be below a third of JOB_LEASE_SECONDS" in done.stdout, "the reason in the log"
    assert "Traceback" not in done.stdout
    clone.up()


def test_a_killed_supervisor_leaves_no_second_stack(clone: Clone) -> None:
    before = clone.processes()
    psutil.Process(int((clone.folder / ".run" / "supervisord.pid").read_text())).kill()
    clone.up()
    after = clone.processes()
    assert set(after) == PROCESSES | SERVERS
    assert not [process for process in before.values() if process.is_running() and process.status() != "zombie"]
    clone.succeeds(clone.job())


def test_down_leaves_no_process_and_keeps_the_data(clone: Clone) -> None:
    job_id = clone.job()
    clone.succeeds(job_id)
    done = clone.make("down")
    assert done.returncode == 0, done.stdout
    assert not clone.everything()
    assert clone.make("down").returncode == 0, "again is fine"
    assert "Nothing runs" in clone.make("ps").stdout
    clone.up()
    assert clone.call(f"/api/jobs/{job_id}")["status"] == "succeeded"


def test_inline_needs_neither_redis_nor_workers(clone: Clone) -> None:
    clone.up(JOBS_EXECUTION="inline")
    assert set(clone.processes()) == {"postgres", "inline"}
    clone.succeeds(clone.job())
    assert {line.split()[0] for line in clone.make("ps").stdout.splitlines()[1:]} == {"postgres", "inline"}


def test_clean_asks_and_deletes(clone: Clone) -> None:
    secrets = (clone.folder / ".env").read_text()
    assert clone.make("clean").returncode != 0, "nobody there to ask"
    assert (clone.folder / ".run" / "postgres").exists()
    assert clone.make("clean", YES="1").returncode == 0
    assert not clone.everything()
    assert not (clone.folder / ".run").exists()
    assert (clone.folder / ".env").read_text() == secrets
