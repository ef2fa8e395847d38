"""Runs a task of the house-keeping now: here, in this process, or in the maintenance worker.

python scripts/trigger_cleanup_manual.py                             (a menu)
python scripts/trigger_cleanup_manual.py cleanup_orphaned_jobs
python scripts/trigger_cleanup_manual.py cleanup_old_files --enqueue
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer
from obstore.exceptions import GenericError

from app.database import Database
from app.queues import MAINTENANCE
from scripts import helper
from scripts.broker import Broker
from scripts.helper import FINE, FOUND, AsJson, DryRun, Script, age, sentence, stop
from worker import housekeeping, maintenance

TASKS = {module.__name__.rpartition(".")[2]: module for module in maintenance.ALL}
# Above the tasks' own hard limit of 120 s.
PATIENCE_SECONDS = 150.0


def main(
    task: Annotated[str | None, typer.Argument(help=f"Of {', '.join(TASKS)}.", show_default=False)] = None,
    enqueue: Annotated[
        bool, typer.Option("--enqueue", help="In the maintenance worker; waits for the result.")
    ] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Exits 0: it ran. 1: it failed, or nobody took it. Each task is safe to run at any time, twice at once too."""
    script = Script(as_json)
    if task is None:
        task = choose(script)
    if task not in TASKS:
        stop(f"There is no task {task!r}; there are: {', '.join(TASKS)}.")
    if dry_run:
        script.say(f"Would run {task} {'in the maintenance worker' if enqueue else 'here'}.")
        script.done(FOUND, would_run=task)
    began = time.monotonic()
    done = in_worker(script, task) if enqueue else here(script, task)
    seconds = time.monotonic() - began
    if "error" in done or "skipped" in done:
        script.say(f"{task}: {done.get('error') or done['skipped']}", "red")
        script.next("debug_beat_service.py" if enqueue else "doctor.py")
        script.done(FOUND, task=task, seconds=seconds, **done)
    said = ", ".join(f"{name} {value}" for name, value in done.items()) or "there was nothing to do"
    script.say(f"{task}: {said} ({age(seconds)}).", "green")
    script.done(FINE, task=task, seconds=seconds, result=done)


def choose(script: Script) -> str:
    names = list(TASKS)
    if script.as_json or not sys.stdin.isatty():
        stop(f"Which task? One of: {', '.join(names)}.")
    for number, name in enumerate(names, 1):
        script.say(f"{number}  {name}: {(TASKS[name].__doc__ or '').splitlines()[0]}")
    answer = input("Which one? ").strip()
    return names[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(names) else answer


def here(script: Script, task: str) -> dict[str, Any]:
    """In slices, until it is finished."""
    # Asked for first: either one away is one sentence.
    _, client = script.database, script.redis
    database = Database(script.settings, "script", statement_seconds=60)
    total: dict[str, Any] = {}
    while True:
        try:
            done: dict[str, Any] = housekeeping.run(TASKS[task], database, client, script.settings, None)
        except GenericError as error:
            stop(f"The storage is away, or refuses: {sentence(error)} Next: doctor.py")
        unfinished = add(total, done)
        if not unfinished:
            return total
        script.say(f"{task} goes on: {total} so far.")


def in_worker(script: Script, task: str) -> dict[str, Any]:
    broker = Broker(script.redis, script.celery, results=script.results)
    if not any(MAINTENANCE in worker.queues for worker in broker.workers().values()):
        return {"error": f"no worker that answers consumes {MAINTENANCE}; without --enqueue it runs here"}
    total: dict[str, Any] = {}
    while True:
        trip = broker.send_and_wait(task, MAINTENANCE, seconds=PATIENCE_SECONDS)
        if not trip.worked:
            return total | {"error": trip.why}
        if not add(total, (trip.result or {}).get("result") or {}):
            return total
        script.say(f"{task} goes on: {total} so far.")


def add(total: dict[str, Any], done: dict[str, Any]) -> bool:
    """Adds a slice's counts to the sum; whether there is more to do."""
    for name, value in done.items():
        if name != "unfinished":
            total[name] = total.get(name, 0) + value if isinstance(value, int | float) else value
    return bool(done.get("unfinished"))


if __name__ == "__main__":
    helper.run(main)
