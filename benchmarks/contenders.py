"""Who is measured: this stack, and its peers. All leave jobs for workers, start workers, and can tell what was done."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from benchmarks import peers, tools
from benchmarks.servers import Bench
from tests.processes import ROOT, Process, running
from tests.servers import free_port
from tests.waiting import until

JOB = {"kind": "flaky", "payload": {"failures": 0}}  # the no-op that is never short
SHORT_JOB = {"kind": "sleep", "payload": {"seconds": 0}}
BATCH = 1000


class NotDoneOnceError(Exception):
    """Jobs were lost or run twice. There is no figure for that."""


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    def fill(self, count: int) -> None:
        """Leaves jobs for workers that don't run yet."""

    def working(self, **env: object) -> Any:
        """A context with workers in it, PROCESSES of them."""

    def over(self) -> int:
        """How many jobs are over."""

    def finishes(self, count: int) -> list[float]:
        """When each job ended, in order. Raises NotDoneOnceError."""


@dataclass
class Jobstack:
    """`make up` without Flower: dispatch and beat take their share of the machine as well."""

    bench: Bench
    short: bool = False

    @property
    def name(self) -> str:
        return "jobstack, short jobs" if self.short else "jobstack"

    @contextmanager
    def api(self, **env: Any) -> Iterator[str]:
        port = free_port()
        with running("app.api", self.bench.folder, PORT=port, **env) as process:
            yield answering(port, process)

    def fill(self, count: int) -> None:
        job = SHORT_JOB if self.short else JOB
        with self.api() as address, httpx.Client(base_url=address, timeout=30) as client:
            for first in range(0, count, BATCH):
                jobs = [job] * min(BATCH, count - first)
                client.post("/api/jobs/batch", json={"jobs": jobs}).raise_for_status()

    @contextmanager
    def working(self, **env: Any) -> Iterator[None]:
        with ExitStack() as stack:
            # The worker comes last, or it would finish what is published before there is any dispatch.
            for name, own in (("worker-maintenance", {"WORKER_QUEUES": "maintenance"}), ("beat", {}), ("worker", {})):
                module = name.partition("-")[0]
                everything: dict[str, Any] = {**own, "WORKER_CONCURRENCY": peers.PROCESSES, **env}
                stack.enter_context(running(module, self.bench.folder, alive=name, **everything))
            yield

    def over(self) -> int:
        return int(self.bench.row("SELECT count(*) FROM jobs WHERE status IN ('succeeded', 'failed', 'cancelled')")[0])

    def finishes(self, count: int) -> list[float]:
        query = """SELECT EXTRACT(EPOCH FROM finished_at)::float FROM jobs
                   WHERE status = 'succeeded' AND attempt = 1 ORDER BY finished_at"""
        times = [time for (time,) in self.bench.db.execute(query)]
        rows, failures = self.bench.row("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM job_attempts)")
        if not (len(times) == rows == count and failures == 0):
            raise NotDoneOnceError(f"{count} jobs, {rows} rows, {len(times)} done at once, {failures} failed attempts")
        return times


@dataclass
class Peer:
    """A program in `benchmarks/peers`."""

    bench: Bench
    name: str

    def _command(self, *words: object) -> list[str]:
        python = sys.executable if self.name in tools.WITH_THE_STACK else str(tools.PYTHON)
        return [python, "-m", f"benchmarks.peers.{self.name}", *map(str, words)]

    def run(self, *words: object) -> None:
        ended = subprocess.run(self._command(*words), cwd=ROOT, check=False, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{self.name}: {ended.stderr}")

    def fill(self, count: int) -> None:
        self.run("fill", count)

    def send(self, count: int) -> None:
        self.run("send", count)

    @contextmanager
    def working(self, **env: object) -> Iterator[None]:
        worker = Process(self._command("work"), self.bench.folder, **env)
        try:
            yield
            if worker.process.poll() is not None:
                raise RuntimeError(f"{self.name}: the worker ended: {worker.log}")
        finally:
            worker.kill()

    @contextmanager
    def api(self, **env: object) -> Iterator[str]:
        port = free_port()
        env = {**env, "PORT": port, "BENCH_LIBRARIES": tools.libraries()}
        server = Process(self._command("serve"), self.bench.folder, **env)
        try:
            yield answering(port, server)
        finally:
            server.kill()

    def over(self) -> int:
        return peers.count(self.bench.ledger.stat().st_size) if self.bench.ledger.exists() else 0

    def finishes(self, count: int) -> list[float]:
        runs = peers.read(self.bench.ledger.read_bytes())
        if sorted(number for _, number, _ in runs) != list(range(count)):
            raise NotDoneOnceError(
                f"{self.name}: {count} jobs, {len(runs)} runs, {len({n for _, n, _ in runs})} jobs run"
            )
        return sorted(time for time, _, _ in runs)


def answering(port: int, process: Process) -> str:
    """The address of an API, once it is ready."""
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        if process.process.poll() is not None:
            raise RuntimeError(process.log)
        try:
            return httpx.get(f"{address}/health/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    until(ready, "the API is up")
    return address


def wait_until_over(contender: Contender, count: int, *, seconds: float = 900) -> int:
    """How many are over by then."""

    def over() -> int:
        time.sleep(0.1)  # asking costs the same cores
        done = contender.over()
        return done if done >= count else 0

    return until(over, f"{contender.name} is through with {count} jobs", seconds=seconds)


def body(jobs: int = 1) -> str:
    """Of a request: one job, or a batch."""
    return json.dumps(JOB if jobs == 1 else {"jobs": [JOB] * jobs})
