"""Stops what comes again and again: a job that is retried, or a Celery task that waits for its next try.

python scripts/stop_retries.py --check 0199f0c2-...
python scripts/stop_retries.py 0199f0c2-...
python scripts/stop_retries.py --all-retries
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer

from scripts import helper, looks
from scripts.helper import FINE, FOUND, AsJson, DryRun, Script, Yes, age, count, stop
from scripts.whereabouts import Survey, Whereabouts, find, judge, locate, survey, withdraw

# Longer than one run of a loop takes to come round, and than a job takes to notice its cancel.
PROOF_SECONDS = 3.0
PATIENCE_SECONDS = 30.0


def main(
    task_id: Annotated[str | None, typer.Argument(metavar="[ID]", show_default=False)] = None,
    check: Annotated[str | None, typer.Option("--check", metavar="ID", help="Does it come again? Only looks.")] = None,
    all_retries: Annotated[bool, typer.Option("--all-retries", help="Everything that waits for another try.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Exits 0: it does not come again. 1: it does (--check), or it would not stop. Other jobs go on."""
    script = Script(as_json)
    if sum((task_id is not None, check is not None, all_retries)) != 1:
        stop("Say which: an ID to stop, --check ID to look at it, or --all-retries to stop everything that retries.")
    if check is not None:
        look_only(script, check)
    if task_id is not None:
        stop_one(script, task_id, dry_run=dry_run)
    stop_all(script, dry_run=dry_run, yes=yes)


def look_only(script: Script, task_id: str) -> None:
    found = find(script, task_id)
    retries, verdict = comes_again(found), judge(found, script.settings)
    script.say(f"{found.id}: {verdict.state}. {verdict.text}", "red" if retries else "green")
    script.next(f"stop_retries.py {found.id}" if retries else "nothing: it does not come again.")
    script.done(FOUND if retries else FINE, retries=retries, state=verdict.state, **found.facts())


def stop_one(script: Script, task_id: str, *, dry_run: bool) -> None:
    found = find(script, task_id)
    state = judge(found, script.settings).state
    if not is_alive(found):
        script.say(f"{found.id} is {state}: it does not come again.", "green")
        script.done(FINE, stopped=False, state=state)
    if dry_run:
        script.say(f"{found.id} is {state} and would be ended.")
        script.done(FOUND, would_stop=[found.id])
    jobs = [found.row["id"]] if found.row else []
    still = end(script, jobs, [] if jobs else [found.id])
    _report(script, [found.id], still, jobs)


def stop_all(script: Script, *, dry_run: bool, yes: bool) -> None:
    rows = script.sql(looks.RETRYING)
    tasks = waiting_tasks(survey(script))
    for row in rows[:20]:
        when = f"next in {age(max(0, row['due_in']))}" if row["status"] == "queued" else f"running on {row['worker']}"
        script.say(f"  job {row['id']} {row['kind']}, run {row['attempt']} of {row['max_attempts']}, {when}")
    for name, what in list(tasks.items())[:20]:
        script.say(f"  Celery task {name} {what}")
    if len(rows) > 20 or len(tasks) > 20:
        script.say("  ...")
    said = f"{count(len(rows), 'job')} and {count(len(tasks), 'Celery task')} come again."
    script.say(said)
    found = [str(row["id"]) for row in rows] + list(tasks)
    if dry_run or not found:
        script.next("the same with --yes stops them; stop_retries.py ID stops one." if found else "nothing.")
        script.done(FOUND if found else FINE, would_stop=found)
    script.confirm(f"{said} Jobs among them will be cancelled, Celery tasks taken out of Redis.", yes)
    jobs = [row["id"] for row in rows]
    still = end(script, jobs, list(tasks))
    new = [str(row["id"]) for row in script.sql(looks.RETRYING)] + list(waiting_tasks(survey(script)))
    if new := sorted(set(new) - set(found)):
        script.say(
            f"Since then {count(len(new), 'other')} failed and will be tried again: {', '.join(new[:5])}", "yellow"
        )
    _report(script, found, still, jobs, since=new)


def waiting_tasks(seen: Survey) -> dict[str, str]:
    """Celery tasks, not jobs, that wait for a time or for another try: id -> what and where."""
    tasks: dict[str, str] = {}
    for queue, _, message in seen.waiting:
        if message.id and not message.job_id and (message.eta or message.retries):
            tasks[message.id] = f"{message.task} in {queue}, try {message.retries + 1}"
    for held in seen.held:
        message = held.message
        if message.id and not message.job_id and (message.eta or message.retries):
            tasks[message.id] = f"{message.task} unacknowledged, try {message.retries + 1}, for {message.eta}"
    for worker in seen.workers.values():
        for request in worker.scheduled:
            if request["id"] not in worker.revoked:
                tasks.setdefault(request["id"], f"{request['name']} scheduled in {worker.name} for {request['eta']}")
    return tasks


def comes_again(found: Whereabouts) -> bool:
    """Whether another try is to come, or is running after an earlier one."""
    if found.row:
        attempt, status = found.row["attempt"], found.row["status"]
        return bool((status == "queued" and attempt > 0) or (status == "running" and attempt > 1))
    return is_alive(found)


def is_alive(found: Whereabouts) -> bool:
    """Whether it could still run: a job by its row alone, a Celery task by any message that a worker would take."""
    if found.row:
        return found.row["status"] in ("queued", "running") and found.row["cancel_requested_at"] is None
    holders = {worker for worker, _ in [*found.reserved, *found.scheduled]}
    return bool(found.waiting or found.held or found.active or holders - set(found.revoked))


def end(script: Script, jobs: list[UUID], tasks: list[str]) -> list[str]:
    """Ends them by every way there is, until none has been seen for a while; returns those that go on all the same.

    However many they are, one look at the workers and at Redis does for all."""
    until = time.monotonic() + PATIENCE_SECONDS
    quiet_since = time.monotonic()
    while True:
        alive = [found for found in locate(survey(script), tasks) if is_alive(found)] if tasks else []
        going = [row["id"] for row in script.sql(looks.NOT_ENDED, {"ids": jobs})] if jobs else []
        now = time.monotonic()
        if not alive and not going and (not tasks or now > quiet_since + PROOF_SECONDS):
            return []
        if now > until:
            return [*map(str, going), *(found.id for found in alive)]
        for job_id in going:
            script.audit(f"cancel {job_id}")
        script.cancel(*going)
        if alive:
            withdraw(script, alive)
            quiet_since = time.monotonic()
        if tasks:
            # One in the middle of a run may just now send the message of its next: looked for again.
            time.sleep(0.5)


def still_running(script: Script, jobs: list[UUID]) -> list[str]:
    """Those that run although their cancel is recorded. Their worker needs a heartbeat or a checkpoint to notice."""
    until = time.monotonic() + PROOF_SECONDS
    while jobs:
        rows = script.sql(looks.ENDING, {"ids": jobs})
        if not rows or time.monotonic() > until:
            return [str(row["id"]) for row in rows]
        time.sleep(0.5)
    return []


def _report(script: Script, asked: list[str], still: list[str], jobs: list[UUID], **more: Any) -> None:
    ending = still_running(script, jobs)
    facts: dict[str, Any] = {
        "stopped": [name for name in asked if name not in {*still, *ending}],
        "ending": ending,
        "still_there": still,
        **more,
    }
    if still:
        script.say(f"{count(len(still), 'task')} will not stop: {', '.join(still[:5])}", "red")
        script.next(
            f"task_manager.py status {still[0]} says who has it; ending that worker ends it: it is in no queue."
        )
        script.done(FOUND, **facts)
    left = "Looked again: none of them is left."
    if ending:
        runs = "runs until its" if len(ending) == 1 else "run until their"
        left = (
            f"{len(ending)} still {runs} next checkpoint and cannot succeed any more: {', '.join(ending[:5])}"
            f"{' ...' if len(ending) > 5 else ''}"
        )
    script.say(
        f"{'Cancelled' if ending else 'Stopped'}: {', '.join(asked[:5])}"
        f"{f' and {len(asked) - 5:,} more' if len(asked) > 5 else ''}. {left}",
        "yellow" if ending else "green",
    )
    which = asked[0] if len(asked) == 1 else "ID"
    again = f"; POST /api/jobs/{which}/retry runs a job again" if jobs else ""
    script.next(f"task_manager.py status {which} says what became of it{again}.")
    script.done(FINE, **facts)


if __name__ == "__main__":
    helper.run(main)
