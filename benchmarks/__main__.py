"""`make bench`: this stack and plain Celery in turn, on servers of their own, and a table of medians."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

os.environ["JOBSTACK_TESTS"] = "embedded"

import httpx
import psycopg
import typer
from rich.console import Console
from rich.table import Table

from scripts.stack import servers
from tests.processes import ROOT, Process, running
from tests.servers import folder, free_port, redis_server
from tests.waiting import until

CONNECTIONS = 16
console = Console()


class Bench:
    """The servers of a run, and what was measured on them."""

    def __init__(self, stack: ExitStack, jobs: int) -> None:
        self.jobs = jobs
        self.folder = folder()
        self.redis = stack.enter_context(redis_server())
        # With fsync, as in production: a commit that does not wait for the disk is another product.
        self.database_url = stack.enter_context(servers.temporary_postgres(fsync=True))
        os.environ.update(
            DATABASE_URL=self.database_url,
            REDIS_URL=self.redis.url,
            STORAGE_URL=f"file://{self.folder}/files",
            LOG_FORMAT="json",
            JOBSTACK_RUN_DIR=str(self.folder),
        )
        subprocess.run([sys.executable, "-m", "app.migrate"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        self.db = stack.enter_context(psycopg.connect(self.database_url, autocommit=True))
        self.results: dict[str, list[float]] = defaultdict(list)

    def reset(self) -> None:
        self.db.execute("TRUNCATE jobs, job_steps, job_attempts, job_files, files")
        self.db.execute("CHECKPOINT")
        self.redis.client.flushall()

    def note(self, name: str, value: float) -> None:
        self.results[name].append(value)
        console.print(f"  {name}: {value:,.1f}")

    # --- ours ---

    @contextmanager
    def workers(self) -> Iterator[None]:
        with ExitStack() as stack:
            start = {"worker": {}, "worker-maintenance": {"WORKER_QUEUES": "maintenance"}, "beat": {}}
            for name, env in start.items():
                stack.enter_context(running(name.partition("-")[0], self.folder, alive=name, **env))
            yield

    def drain(self) -> None:
        """Ordinary no-op jobs from rows to finished rows: dispatch, claim, run, finish."""
        self.reset()
        self.db.execute(
            """INSERT INTO jobs (id, kind, priority, queue, payload, max_attempts)
               SELECT gen_random_uuid(), 'flaky', 'default', 'default', '{"failures": 0}', 4
               FROM generate_series(1, %s)""",
            [self.jobs],
        )
        with self.workers():
            until(lambda: not self._left(), "all jobs are over", seconds=300)
        (rate,) = self._row(
            """SELECT count(*) FILTER (WHERE share BETWEEN 0.05 AND 0.95) / EXTRACT(EPOCH FROM
                   max(finished_at) FILTER (WHERE share <= 0.95) - min(finished_at) FILTER (WHERE share >= 0.05))
               FROM (SELECT finished_at, percent_rank() OVER (ORDER BY finished_at) AS share
                     FROM jobs WHERE status = 'succeeded') AS finished"""
        )
        self.note("drain: jobstack, jobs/s", float(rate))

    def _left(self) -> int:
        (left,) = self._row("SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')")
        time.sleep(0.2)
        return int(left)

    def _row(self, query: str) -> Any:
        return self.db.execute(query).fetchone()  # type: ignore[arg-type]

    def posts(self) -> None:
        """POST /api/jobs, one API process, nobody working on the jobs."""
        self.reset()
        with self.api() as address:
            body = json.dumps({"kind": "flaky", "payload": {"failures": 0}})
            command = [sys.executable, "-m", "benchmarks.load", f"{address}/api/jobs", body, str(CONNECTIONS), "5"]
            found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        self.note("POST /api/jobs: per second", found["per_second"])
        self.note("POST /api/jobs: p99 ms", found["p99"])

    def latency(self) -> None:
        """Created to started, workers idle."""
        self.reset()
        with self.workers(), self.api() as address, httpx.Client(base_url=address) as client:
            for _ in range(200):
                client.post("/api/jobs", json={"kind": "flaky", "payload": {"failures": 0}}).raise_for_status()
                time.sleep(0.02)
            until(lambda: not self._left(), "all jobs are over")
        waits = sorted(
            float(wait) * 1000
            for (wait,) in self.db.execute("SELECT EXTRACT(EPOCH FROM started_at - created_at) FROM jobs")
        )
        self.note("created to started: jobstack, p50 ms", waits[len(waits) // 2])
        self.note("created to started: jobstack, p99 ms", waits[int(len(waits) * 0.99)])

    @contextmanager
    def api(self) -> Iterator[str]:
        port = free_port()
        with running("app.api", self.folder, PORT=port, LOG_LEVEL="WARNING") as process:
            address = f"http://127.0.0.1:{port}"
            until(lambda: _answers(address), f"the API is up: {process.log}")
            yield address

    # --- plain Celery ---

    @contextmanager
    def plain_worker(self) -> Iterator[Any]:
        from benchmarks import plain

        options = ["--queues=plain", "--concurrency=2", "--pool=prefork", "--without-gossip", "--without-mingle"]
        command = [sys.executable, "-m", "celery", "--quiet", "-A", "benchmarks.plain", "worker", *options]
        worker = Process(command, self.folder)
        try:
            yield plain
        finally:
            worker.kill()

    def plain_drain(self) -> None:
        self.reset()
        from benchmarks import plain

        plain.noop.delay()
        [message] = self.redis.client.lrange("plain", 0, -1)  # type: ignore[misc, union-attr]
        # The worker keeps messages apart by their ids and tags.
        uuid = json.loads(message)["headers"]["id"].encode()
        tag = json.loads(message)["properties"]["delivery_tag"].encode()
        copies = [
            message.replace(uuid, b"%032x" % number).replace(tag, b"%x" % number) for number in range(1, self.jobs + 1)
        ]
        self.redis.client.delete("plain")
        self.redis.client.lpush("plain", *copies)
        marks: list[float] = []
        with self.plain_worker():
            for share in (0.95, 0.05):
                until(lambda share=share: self._plain_left() <= self.jobs * share, "plain drains", seconds=300)
                marks.append(time.perf_counter())
        self.note("drain: plain Celery, tasks/s", self.jobs * 0.9 / (marks[1] - marks[0]))

    def _plain_left(self) -> int:
        return int(self.redis.client.llen("plain"))  # type: ignore[arg-type]

    def plain_latency(self) -> None:
        self.reset()
        with self.plain_worker() as plain:
            plain.stamp.delay(time.time())
            until(lambda: self.redis.client.llen("plain:waits"), "plain Celery is up")
            self.redis.client.delete("plain:waits")
            for _ in range(200):
                plain.stamp.delay(time.time())
                time.sleep(0.02)
            until(lambda: self.redis.client.llen("plain:waits") == 200, "plain Celery is done")
            waits = sorted(float(wait) * 1000 for wait in self.redis.client.lrange("plain:waits", 0, -1))  # type: ignore[union-attr]
        self.note("sent to started: plain Celery, p50 ms", waits[100])
        self.note("sent to started: plain Celery, p99 ms", waits[198])


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def main(
    rounds: Annotated[int, typer.Option(help="How often each is measured; they take turns.")] = 5,
    jobs: Annotated[int, typer.Option(help="Jobs a drain.")] = 5000,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / ".run" / "bench.json",
) -> None:
    """Measures this stack and plain Celery in turn and prints medians, spreads and the ratio of each pair."""
    with ExitStack() as stack:
        bench = Bench(stack, jobs)
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            for measure in (bench.plain_drain, bench.drain, bench.posts, bench.plain_latency, bench.latency):
                measure()
        results = dict(bench.results)
    results["drain: jobstack / plain Celery"] = [
        ours / theirs
        for ours, theirs in zip(
            results["drain: jobstack, jobs/s"], results["drain: plain Celery, tasks/s"], strict=True
        )
    ]
    table = Table("", "median", "min", "max")
    for name, values in results.items():
        table.add_row(name, *(f"{value:,.2f}" for value in (statistics.median(values), min(values), max(values))))
    console.print(table)
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=2))
    console.print(f"The figures are in {output}.")


if __name__ == "__main__":
    typer.run(main)
