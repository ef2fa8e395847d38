"""A whole worker that dies, with its children."""

from collections.abc import Callable

from tests.integration.conftest import QUICK, Cancel, Jobs
from tests.processes import Process


def test_a_killed_worker(start: Callable[..., Process], jobs: Jobs, cancel: Cancel) -> None:
    """Power cut: neither child nor parent can say anything. Another worker goes on when the lease has run out."""
    worker = start("worker", **QUICK)
    running = [jobs.start("sleep", {"seconds": 120, "steps": 1000}) for _ in range(2)]
    for job_id in running:
        jobs.running(job_id)
    worker.kill()
    for name in ("worker", "worker-maintenance", "beat"):
        start(name, **QUICK)
    for job_id in running:
        jobs.running(job_id, attempt=2, seconds=45)
        [attempt] = jobs.attempts(job_id)
        assert attempt["error"] == {
            "type": "LeaseLost",
            "message": "lease lost: its worker gave no sign of life for 4 s",
        }
    cancel(*running)
