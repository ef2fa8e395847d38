"""POST /api/jobs and /api/jobs/batch: one API process, nobody who works on the jobs."""

import json
import subprocess
import sys

from benchmarks.contenders import BATCH, Jobstack, NotDoneOnceError, Peer, body
from benchmarks.noise import watched
from benchmarks.servers import Bench
from tests.processes import ROOT
from tests.waiting import until

CONNECTIONS = 16
SECONDS = 5
Figures = tuple[dict[str, float], dict[str, float]]


def posts(bench: Bench, contender: Jobstack | Peer) -> Figures:
    """One job a request, 16 connections. Each job is published, as the template's are: with its usual window this stack
    would leave most of them to dispatch, which is less work for the API."""
    bench.reset()
    with contender.api(QUEUE_WINDOW=10_000_000) as address:
        load, noise = _load(f"{address}/api/jobs", body(), CONNECTIONS)
        table, queue = ("jobs", "default") if isinstance(contender, Jobstack) else ("template_jobs", "template")
        # This stack publishes behind the answer, and is some milliseconds late with the last ones.
        until(lambda: bench.redis.length(queue) >= load["answers"], f"{contender.name} has published", seconds=5)
    [rows], messages = bench.row(f"SELECT count(*) FROM {table}"), bench.redis.length(queue)
    if not rows == messages == load["answers"]:
        raise NotDoneOnceError(f"{contender.name}: {load['answers']} times 202, {rows} rows, {messages} messages")
    return _shown(load), noise


def batches(bench: Bench, contender: Jobstack) -> Figures:
    """A thousand jobs a request, 2 connections, by the usual window: what does not fit waits in PostgreSQL."""
    bench.reset()
    with contender.api() as address:
        load, noise = _load(f"{address}/api/jobs/batch", body(BATCH), 2)
    [rows] = bench.row("SELECT count(*) FROM jobs")
    if rows != load["answers"] * BATCH:
        raise NotDoneOnceError(f"{load['answers']} times 202, {rows} rows")
    figures = _shown(load)
    return {"jobs/s": figures.pop("requests/s") * BATCH, **figures}, noise


def _load(address: str, content: str, connections: int) -> Figures:
    command = [sys.executable, "-m", "benchmarks.load", address, str(connections), str(SECONDS)]
    with watched() as noise:
        ended = subprocess.run(command, cwd=ROOT, check=True, input=content, capture_output=True, text=True)
    return json.loads(ended.stdout), noise


def _shown(load: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in load.items() if name != "answers"}
