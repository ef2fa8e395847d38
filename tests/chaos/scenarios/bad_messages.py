"""Messages come twice, late, for nothing, broken, and not at all."""

import json
import time
from typing import Any

from app.jobs import messages
from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario
from tests.waiting import until


@scenario(2, ci=True, rate=0)
def duplicates(chaos: Chaos) -> None:
    """Fifty copies of each message at once: each job is claimed once."""
    jobs = [chaos.insert("sleep", {"seconds": 0.5, "steps": 1}, published_at="now") for _ in range(10)]
    chaos.push(jobs, copies=50)
    chaos.drained()
    for job in jobs:
        chaos.reaches(job.id, "succeeded")
        chaos.expect(chaos.moves(job.id) == ["queued running", "running succeeded"], f"{job.id}: {chaos.moves(job.id)}")


@scenario(2, 8, rate=0)
def replays(chaos: Chaos) -> None:
    """Messages of jobs that are finished, cancelled or deleted: nothing moves."""
    done = [chaos.insert("flaky", {"failures": 0}) for _ in range(5)]
    for job in done:
        chaos.reaches(job.id, "succeeded")
    cancelled = [chaos.insert("sleep", {"seconds": 60}, run_at="tomorrow", ends="cancelled") for _ in range(5)]
    for job in cancelled:
        chaos.cancel(str(job.id))
    deleted = [messages.Address(chaos.insert("flaky", {"failures": 0}).id, "flaky", "default") for _ in range(5)]
    for job in deleted:
        chaos.reaches(job.id, "succeeded")
    chaos.sql("DELETE FROM jobs WHERE id = ANY(%(ids)s)", ids=[job.id for job in deleted])
    chaos.load.forget({str(job.id) for job in deleted})
    before = {job.id: chaos.moves(job.id) for job in (*done, *cancelled, *deleted)}
    chaos.push((*done, *cancelled, *deleted), copies=5)
    chaos.drained()
    after = {job_id: chaos.moves(job_id) for job_id in before}
    chaos.expect(before == after, f"{before} became {after}")
    chaos.expect(not chaos.sql("SELECT 1 FROM jobs WHERE id = ANY(%(ids)s)", ids=[job.id for job in deleted]), "undead")


def _malformed(chaos: Chaos) -> dict[str, str]:
    good = json.loads(messages.envelope("run_job", "default", "x", ["not a job's id"]))

    def but(**changes: Any) -> str:
        return json.dumps(good | changes)

    return {
        "not JSON": "{hello",
        "no envelope": json.dumps({"hello": "world"}),
        "no headers": but(headers={}),
        "bad base64": but(body="%%%"),
        "unknown task": messages.envelope("rm_rf", "default", "y", []),
        "wrong arguments": messages.envelope("run_job", "default", "z", ["a", "b", "c"]),
        "not a job's id": json.dumps(good),
        "20 MB": messages.envelope("rm_rf", "default", "w", ["x" * 15_000_000], argsrepr=""),
    }


@scenario(1, 5, ci=True, rate=0)
def malformed(chaos: Chaos) -> None:
    """Messages that nobody can read, and good ones behind them: those run, and the bad ones do not come back."""
    for name, message in _malformed(chaos).items():
        job = chaos.insert("flaky", {"failures": 0}, published_at="now")
        # Two of each: both workers get to read some.
        chaos.redis.lpush("default", message, message)
        chaos.push([job])
        try:
            chaos.reaches(job.id, "succeeded", seconds=8)
        except AssertionError:
            chaos.expect(False, f"behind {name!r} a job waits for more than 8 s")
    chaos.drained()


@scenario(2)
def redelivered(chaos: Chaos) -> None:
    """The messages of running jobs come again: the jobs do not."""
    rows = chaos.sql("SELECT id, kind, queue FROM jobs WHERE status = 'running'")
    chaos.push([messages.Address(**row) for row in rows], copies=3)


@scenario(1, bound=20, rate=0)
def hidden_losses(chaos: Chaos) -> None:
    """A hundred duplicates hide a hundred losses from everybody who only counts."""
    with chaos.all_frozen("worker"):
        jobs = [chaos.insert("flaky", {"failures": 0}, published_at="now") for _ in range(200)]
        # Settled ten seconds from now, so that nobody takes them for messages on their way.
        chaos.push(jobs[:100], copies=2)
        # The ids are compared once a minute; that minute passes quickly.
        chaos.redis.expire("jobstack:dispatch:checked", 11)
        wanted = {str(job.id) for job in jobs}
        began = time.monotonic()
        until(lambda: wanted <= _waiting(chaos), "the lost ones are in the list", seconds=40)
        chaos.measured["noticed after, s"] = round(time.monotonic() - began, 1)
        chaos.fault_over()


def _waiting(chaos: Chaos) -> set[str]:
    """The jobs with a message in `default`, and those whose message a frozen worker has got."""
    listed: Any = chaos.redis.lrange("default", 0, -1)
    return {str(messages.job_id_of(message)) for message in listed}
