"""Whoever is on call runs the scripts in the worker's container."""

import json

import pytest

from tests.e2e.stack import Stack

FINE, FOUND, COULD_NOT = 0, 1, 2


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("doctor.py", FINE),
        ("debug_beat_service.py", FINE),
        ("test_celery.py --async", FINE),
        ("task_manager.py status 01999999-0000-7000-8000-000000000000", COULD_NOT),
        ("stop_retries.py --all-retries --dry-run", FINE),
        ("trigger_cleanup_manual.py health_check --enqueue", FINE),
        ("cleanup_redis_manual.py --yes", FINE),
        ("purge_celery_queue.py low_priority --yes", FINE),
        ("purge_celery_duplicates.py --yes", FINE),
        ("rebuild_queue.py", FINE),
        ("rename_project.py acme", COULD_NOT),  # there is no git clone
    ],
)
def test_a_script_runs_in_the_worker_s_container(stack: Stack, command: str, code: int) -> None:
    said, _, ended = run(stack, f"python scripts/{command} --json").strip().rpartition("\n")
    assert (int(ended), json.loads(said)["ok"]) == (code, code == FINE), said
    assert not any(secret.rpartition(":")[2] in said for secret in stack.secrets.values())


def test_a_worker_is_started_by_hand(stack: Stack) -> None:
    # Stopped as by Ctrl-C: it says good-bye and ends well.
    said, _, ended = run(stack, "timeout -s TERM 15 scripts/start_celery_worker.sh low_priority").rpartition("\n")
    assert "ready" in said, (said, ended)


def run(stack: Stack, command: str) -> str:
    """What it printed, and its exit code in a last line."""
    return stack.execute("worker", "sh", "-c", f"{command} 2>&1; echo $?")
