"""Where a job or a Celery task is, what that means, and its end.

python scripts/task_manager.py status 0199f0c2-...
python scripts/task_manager.py revoke 0199f0c2-...
"""

import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer
from celery.states import READY_STATES

from app.jobs.messages import RUN_JOB
from app.jobs.requests import shown
from scripts import helper, looks
from scripts.broker import Broker
from scripts.helper import FINE, FOUND, AsJson, DryRun, Script, count, stop
from scripts.whereabouts import Whereabouts, find, judge, look, take_away, withdraw

app = helper.commands(help=__doc__)
Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, or any Celery task's.")]


@app.command()
def status(task_id: Id, as_json: AsJson = False) -> None:
    """In one look: its state, where it is, what to do next. Exits 1 if something should be done."""
    script = Script(as_json)
    found = find(script, task_id)
    _tell(script, found)
    verdict = judge(found, script.settings)
    script.done(verdict.code, state=verdict.state, message=verdict.text, next=verdict.next, **found.facts())


@app.command()
def info(task_id: Id, as_json: AsJson = False) -> None:
    """All that is known: its row, its failed attempts, its recorded steps, its messages, its result."""
    script = Script(as_json)
    found = find(script, task_id)
    facts: dict[str, Any] = {}
    if found.row:
        ours = {"id": found.job_id}
        facts["row"] = shown(found.row).model_dump(mode="json") | {
            name: found.row[name] for name in ("node", "pid", "published_at", "cancel_requested_at", "lease_expires_at")
        }
        facts |= {
            "attempts": script.sql(looks.ATTEMPTS, ours),
            "steps": script.sql(looks.STEPS, ours),
            "files": script.sql(looks.FILES, ours),
        }
    facts["results_in_celery"] = {name: result for name, (result, _) in found.results.items()}
    for name, value in facts.items():
        if value:
            script.say(name, "bold")
        entries = value.items() if isinstance(value, dict) else enumerate(value, 1)
        for key, entry in entries:
            if entry is not None:
                script.say(f"  {key}: {_line(entry)}")
    _tell(script, found)
    verdict = judge(found, script.settings)
    script.done(verdict.code, state=verdict.state, next=verdict.next, **found.facts(), **facts)


@app.command()
def revoke(task_id: Id, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Ends it. A job is cancelled on its row, which sticks; a Celery task is taken out of Redis and its workers."""
    script = Script(as_json)
    found = find(script, task_id)
    before = judge(found, script.settings)
    if not (found.row["status"] in ("queued", "running") if found.row else found.is_in_celery):
        script.say(f"There is nothing to end: it is {before.state}.")
        script.done(FOUND, state=before.state, message="there is nothing to end")
    if dry_run:
        script.say(f"It is {before.state} and would be ended.")
        script.done(FOUND, state=before.state, would="end it")
    script.audit(f"revoke {task_id}")
    if found.job_id and found.row:
        script.cancel(found.job_id)
    else:
        withdraw(script, [found])
    after = look(script, task_id)
    _tell(script, after)
    verdict = judge(after, script.settings)
    script.done(FINE, state=verdict.state, message=verdict.text, next=verdict.next)


@app.command()
def cleanup(
    task_id: Id,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Taken for other scripts' sake: this never asks.")] = False,
) -> None:
    """Takes away what a finished task left in Redis: messages, unacknowledged copies, its result. The row stays.

    Exits 2 where a Celery task has not ended.
    """
    script = Script(as_json)
    found = find(script, task_id)
    if _is_to_come(found):
        # Its message is all there is of it: a job has its row, a Celery task would be gone for good.
        state = judge(found, script.settings).state
        stop(f"{found.id} is {state} and may still run. Next: task_manager.py revoke {found.id} ends it.", state=state)
    if found.active or found.reserved or (found.row and found.row["status"] in ("queued", "running")):
        script.say("It is not over, so what is in Redis is needed.")
        script.next(f"task_manager.py revoke {found.id}, then cleanup.")
        script.done(FOUND, state=judge(found, script.settings).state, message="it is not over")
    what = {"messages": len(found.waiting), "unacked": len(found.held), "results": len(found.results)}
    said = ", ".join(f"{number} {name}" for name, number in what.items() if number) or "nothing"
    if dry_run:
        script.say(f"Would remove: {said}.")
        script.done(FOUND if any(what.values()) else FINE, would_remove=what)
    take_away(script, [found])
    for name in found.results:
        Broker(script.redis, script.celery, results=script.results).forget_result(name)
    script.say(f"Removed: {said}.")
    script.done(FINE, removed=what)


def _is_to_come(found: Whereabouts) -> bool:
    """Whether it is a Celery task, and no message of a job that is gone, of which no result says that it ended."""
    ended = any(result.get("status") in READY_STATES for result, _ in found.results.values())
    return found.row is None and found.is_in_celery and found.tasks != {RUN_JOB} and not ended


def _tell(script: Script, found: Whereabouts) -> None:
    verdict = judge(found, script.settings)
    name = f"{found.row['kind']} {found.id}" if found.row else f"Celery task {found.id}"
    script.say(f"{name}: {verdict.state}", "green" if verdict.code == FINE else "red")
    script.say(verdict.text)
    places = {
        "queue": [f"{queue} at {position}" for queue, position, _ in found.waiting[:5]],
        "unacked": [f"of {held.queue}" for held in found.held[:5]],
        **{place: [worker for worker, _ in getattr(found, place)] for place in ("active", "reserved", "scheduled")},
        "revoked at": found.revoked,
    }
    for place, where in places.items():
        if where:
            script.say(f"  {place}: {', '.join(where)}")
    if len(found.waiting) > 5:
        script.say(f"  {count(len(found.waiting), 'message')} in all")
    script.next(verdict.next.replace("ID", found.id))


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
    return str(value)


if __name__ == "__main__":
    helper.run(app)
