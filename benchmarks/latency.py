"""From created to started, with workers that have nothing else to do."""

import os
import time

import httpx

from benchmarks import peers
from benchmarks.contenders import JOB, Jobstack, Peer, wait_until_over
from benchmarks.noise import watched
from benchmarks.servers import Bench

# The first ones wait for workers that start, and for connections.
WARM_UP = 20


def latency(bench: Bench, contender: Jobstack | Peer, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds. This stack: `started_at - created_at`, from the INSERT, which the API's commit and publishing come
    after, to the claim. A peer: from before its call (its INSERT, if it has one) to the first line of its task."""
    bench.reset()
    total = count + WARM_UP
    with contender.working():
        if isinstance(contender, Jobstack):
            with contender.api() as address, httpx.Client(base_url=address) as client:
                _post(client, WARM_UP)
                wait_until_over(contender, WARM_UP)
                bench.db.execute("TRUNCATE jobs, job_steps, job_attempts, job_files")
                with watched() as noise:
                    _post(client, total)
                wait_until_over(contender, total)
            query = "SELECT EXTRACT(EPOCH FROM started_at - created_at)::float FROM jobs ORDER BY created_at"
            waits = [wait for (wait,) in bench.db.execute(query)]
        else:
            contender.send(WARM_UP)
            wait_until_over(contender, WARM_UP)
            os.truncate(bench.ledger, 0)
            with watched() as noise:
                contender.send(total)
            wait_until_over(contender, total)
            runs = sorted(peers.read(bench.ledger.read_bytes()), key=lambda run: run[2])
            waits = [started - sent for started, _, sent in runs]
        contender.finishes(total)
    waits = sorted(waits[WARM_UP:])
    return {f"p{share * 100:g} ms": waits[int(len(waits) * share)] * 1000 for share in (0.5, 0.99)}, noise


def _post(client: httpx.Client, count: int) -> None:
    for _ in range(count):
        client.post("/api/jobs", json=JOB).raise_for_status()
        time.sleep(peers.GAP_SECONDS)
