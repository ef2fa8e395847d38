"""Jobs that kill whoever runs them."""

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario
from tests.e2e.stack import FINAL


def poison(chaos: Chaos, error: str, reason: str, seconds: float, max_attempts: int = 3) -> None:
    """It ends as `failed` after its attempts, with a reason that names the cause."""
    entry = chaos.load.create("flaky", {"failures": 99, "error": error}, ends="failed", max_attempts=max_attempts)
    chaos.reaches(entry.job_id, *FINAL, seconds=seconds)
    job = chaos.job(entry.job_id)
    chaos.expect(job["attempt"] == max_attempts, f"stopped after {job['attempt']} attempts")
    chaos.expect(reason in str(job["error"]), f"the reason does not name {reason!r}: {job['error']}")
    chaos.measured["reason"] = job["error"]["message"]


@scenario(5, ci=True, rate=10)
def poison_crash(chaos: Chaos) -> None:
    """A segmentation fault."""
    poison(chaos, "crash", "signal 11", 60)


@scenario(5, rate=10)
def poison_exit(chaos: Chaos) -> None:
    """A handler that ends its process."""
    poison(chaos, "exit", "exitcode 1", 60)


@scenario(5, rate=10)
def poison_oom(chaos: Chaos) -> None:
    """A handler that fills its container's memory."""
    poison(chaos, "oom", "out of memory", 90, max_attempts=2)


@scenario(5, rate=10)
def poison_hang(chaos: Chaos) -> None:
    """A handler that does not even notice its soft limit."""
    poison(chaos, "hang", "hard time limit", 90, max_attempts=2)
