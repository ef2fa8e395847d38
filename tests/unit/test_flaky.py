"""The kind `flaky`. Its failures are real ones: those that end a process get a process to end."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from app.jobs.kinds.flaky import KIND, Payload, Result
from worker.context import Context
from worker.errors import PermanentError, TransientError
from worker.handlers import flaky

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024


def run(attempt: int, execution: str = "celery", **payload: Any) -> Result:
    settings = SimpleNamespace(jobs_execution=execution)
    context = cast(Context, SimpleNamespace(attempt=attempt, settings=settings))
    return flaky.run(Payload.model_validate(payload), context)


def fail_in_a_child(error: str, before: str = "", around: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the handler in a process of its own. `before` is code, `around` a context manager."""
    code = f"""
import atexit, contextlib, os, resource, threading, tracemalloc
from pathlib import Path
from types import SimpleNamespace
from app.jobs.kinds.flaky import Payload
from worker.handlers import flaky
from worker.time_limit import SoftLimit
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
atexit.register(print, "cleaned up")
{before}
with {around or "contextlib.nullcontext()"}:
    flaky.run(
        Payload(failures=1, error={error!r}),
        SimpleNamespace(attempt=1, settings=SimpleNamespace(jobs_execution="celery")),
    )
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("failures", "attempt"), [(0, 1), (1, 2), (3, 4), (1, 9)])
@pytest.mark.parametrize("error", ["transient", "permanent", "crash", "exit", "oom", "hang"])
def test_later_attempts_succeed(failures: int, attempt: int, error: str) -> None:
    assert run(attempt, failures=failures, error=error) == Result(attempt=attempt)


@pytest.mark.parametrize(("failures", "attempt"), [(1, 1), (3, 1), (3, 3)])
def test_the_first_attempts_fail(failures: int, attempt: int) -> None:
    with pytest.raises(TransientError, match=f"attempt {attempt} "):
        run(attempt, failures=failures)
    with pytest.raises(PermanentError, match=f"attempt {attempt} "):
        run(attempt, failures=failures, error="permanent")


def test_crash_is_a_segmentation_fault() -> None:
    child = fail_in_a_child("crash")
    assert child.returncode == -signal.SIGSEGV
    assert child.stdout == ""


def test_exit_cleans_nothing_up() -> None:
    child = fail_in_a_child("exit")
    assert child.returncode == 1
    assert (child.stdout, child.stderr) == ("", "")


@pytest.mark.parametrize(("limit", "filled"), [("64", 64), ("max", 512)])
def test_oom_fills_memory_and_ends_by_sigkill(tmp_path: Path, limit: str, filled: int) -> None:
    """With a MiB of 64 KiB, and a report at the moment of the kill."""
    mib = 64 * 1024
    (tmp_path / "memory.max").write_text(limit if limit == "max" else str(int(limit) * mib))
    child = fail_in_a_child(
        "oom",
        f"""
flaky.CGROUP, flaky.MIB = Path({str(tmp_path)!r}), {mib}
score = Path("/proc/self/oom_score_adj")
def report(*args, kill=os.kill):
    picked = score.read_text() if score.exists() else 1000
    print(tracemalloc.get_traced_memory()[0] // {mib}, picked, flush=True)
    kill(*args)
os.kill = report
tracemalloc.start()
""",
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    held, score = map(int, child.stdout.split())
    assert filled <= held <= filled * 1.3 + 16
    assert score == 1000, "the kernel must pick this process"


@pytest.mark.parametrize(
    ("files", "mebibytes"),
    [
        ({}, 512),
        ({"memory.max": "max\n"}, 512),
        ({"memory.max": f"{256 * MIB}\n"}, 256),
        ({"memory.max": f"{1024 * MIB}\n"}, 1024),
        ({"memory/memory.limit_in_bytes": f"{300 * MIB}\n"}, 300),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 512),
        ({"memory.max": f"{64 * 1024 * MIB}\n"}, 512),
    ],
)
def test_how_much_oom_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], mebibytes: int
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(flaky, "CGROUP", tmp_path)
    assert flaky._bytes_to_fill() == mebibytes * MIB


def test_hang_outlives_the_soft_limit() -> None:
    child = fail_in_a_child(
        "hang",
        """
limit = SoftLimit(0.2)
after = threading.Timer(5, lambda: (print(limit._struck, flush=True), os._exit(7)))
after.daemon = True  # must not keep a handler that gave up alive
after.start()
""",
        "limit",
    )
    assert (child.returncode, child.stdout) == (7, "True\n"), child.stderr


@pytest.mark.parametrize("error", ["crash", "exit", "oom", "hang"])
def test_without_a_child_process_nothing_is_blown_up(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flaky._BLOWS, error, lambda: pytest.fail("this would have ended the API"))
    with pytest.raises(PermanentError, match="no child process"):
        run(1, "inline", failures=1, error=error)


@pytest.mark.parametrize("error", ["transient", "permanent"])
def test_ordinary_errors_work_without_a_child_process(error: str) -> None:
    with pytest.raises((TransientError, PermanentError), match="fails as asked for"):
        run(1, "inline", failures=1, error=error)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"failures": -1},
        {"failures": 1.5},
        {"failures": 10**7},
        {"failures": 1, "error": "sulk"},
        {"failures": 1, "x": 1},
    ],
)
def test_bad_payloads(payload: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Payload.model_validate(payload)


def test_it_is_short_lived_and_for_demonstrations_only() -> None:
    assert (KIND.soft_time_limit, KIND.time_limit, KIND.demo) == (5, 10, True)
