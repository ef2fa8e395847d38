"""Cancel sticks: it is recorded on the row, and from that answer on the job cannot succeed."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psutil
import pytest

from app.database import Database
from app.jobs import statements
from app.settings import Settings
from tests.integration.conftest import Cancel, Jobs, events, log_lines
from tests.processes import Process
from tests.waiting import until

ROUNDS = 200
ENDS: dict[str, dict[str, Any]] = {
    "FINISH": {"result": "{}"},
    "FAIL": {"error": "{}", "retry_in": 0, "published": False},
    "HAND_BACK": {"retry_in": 0},
}


def test_queued_is_over_at_once(jobs: Jobs, database: Database) -> None:
    job_id = jobs.insert()
    [row] = database.run(statements.CANCEL, {"id": job_id})
    assert row["status"] == "cancelled"
    assert row["finished_at"] is not None
    assert database.run(statements.CANCEL, {"id": job_id}) == []


def test_running_ends_at_its_next_checkpoint(worker: Process, jobs: Jobs, database: Database) -> None:
    job_id = jobs.start("sleep", {"seconds": 60, "steps": 1})
    jobs.running(job_id)
    [row] = database.run(statements.CANCEL, {"id": job_id})
    assert (row["status"], row["finished_at"]) == ("running", None)
    job = jobs.finished(job_id)  # well before its 60 s
    assert (job["status"], job["attempt"], job["error"], job["result"]) == ("cancelled", 1, None, None)
    assert jobs.attempts(job_id) == []


def test_a_handler_that_never_looks_is_stopped(worker: Process, jobs: Jobs, cancel: Cancel) -> None:
    job_id = jobs.start("odd", {"do": "never look", "seconds": 60})
    pid = jobs.running(job_id)["pid"]
    begin = time.monotonic()
    cancel(job_id)
    job = jobs.finished(job_id)
    assert 1.5 <= time.monotonic() - begin < 30  # CANCEL_GRACE_SECONDS, and a heartbeat to hear of it; not its 60
    assert (job["status"], job["attempt"], job["error"]) == ("cancelled", 1, None)
    assert jobs.attempts(job_id) == []
    # The worker goes on with a new child.
    after = [jobs.start() for _ in range(4)]
    assert [jobs.finished(job_id)["status"] for job_id in after] == ["succeeded"] * 4
    until(lambda: not psutil.pid_exists(pid), "its process is gone")
    assert len(events(worker, "cancelled_job_killed")) == 1
    assert not [line for line in log_lines(worker) if "exception" in line], worker.log


@pytest.mark.parametrize("end", ENDS)
def test_cancel_raced_against_the_end(end: str, settings: Settings, jobs: Jobs, database: Database) -> None:
    other = Database(settings, "canceller")
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        for number in range(ROUNDS):
            token = uuid4()
            job_id = jobs.insert(status="running", attempt=1, lease_token=token, lease_expires_at="now()")
            barrier = threading.Barrier(2, timeout=60)
            lead = (number % 21 - 10) / 2000  # now one is first by up to 5 ms, now the other

            def cancel(job_id: Any = job_id, barrier: Any = barrier, later: float = max(lead, 0)) -> list[Any]:
                barrier.wait()
                time.sleep(later)
                return other.run(statements.CANCEL, {"id": job_id})

            answer = pool.submit(cancel)
            barrier.wait()
            time.sleep(max(-lead, 0))
            rows = database.run(getattr(statements, end), {"id": job_id, "token": token, "progress": None, **ENDS[end]})
            assert len(rows) == 1
            said = [row["status"] for row in answer.result()]
            final = jobs.get(job_id)["status"]
            if end == "FINISH":
                assert (said, final) in ((["running"], "cancelled"), ([], "succeeded"))
            else:  # a job that is queued again can be cancelled as such
                assert (said, final) in ((["running"], "cancelled"), (["cancelled"], "cancelled"))
            seen.add(tuple(said))
    other.close()
    assert len(seen) == 2, "one side won every time, so nothing was raced"


def test_cancel_raced_against_a_worker(worker: Process, jobs: Jobs, database: Database) -> None:
    seen = set()
    for number in range(ROUNDS):
        job_id = jobs.start("flaky", {"failures": 0})
        time.sleep(0.5 if number % 20 == 19 else number % 20 / 500)  # now and then surely after its end
        said = [row["status"] for row in database.run(statements.CANCEL, {"id": job_id})]
        final = jobs.finished(job_id)["status"]
        assert final == ("cancelled" if said else "succeeded")
        seen.add((*said, final))
    assert seen >= {("cancelled", "cancelled"), ("succeeded",)}, "nothing was raced"
