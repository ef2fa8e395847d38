"""Throws a queue's messages away, and says which jobs come back from PostgreSQL by themselves, and what does not.

python scripts/purge_celery_queue.py low_priority --dry-run
"""

import sys
from collections import Counter
from pathlib import Path
from secrets import token_hex
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from app.jobs.dispatch import CHECK_SECONDS, SETTLE_SECONDS
from app.jobs.messages import RUN_SHORT_JOBS
from scripts import helper, looks
from scripts.broker import Broker, Message
from scripts.helper import FINE, FOUND, AsJson, DryRun, Queues, Script, Yes, count

# Dispatch comes every two seconds.
BACK_SECONDS = SETTLE_SECONDS + 5


def main(queues: Queues = None, as_json: AsJson = False, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Exits 0: purged, or empty. 1 with --dry-run: there is something to purge."""
    script = Script(as_json)
    names = script.queues(queues)
    broker = Broker(script.redis, script.celery)
    # Asked before anything is gone: without PostgreSQL nobody could say what comes back.
    rows = {row["queue"]: row for row in script.sql(looks.QUEUED, {"queues": names})}
    depths = broker.depths(names)
    if not any(depths.values()):
        script.say(f"Nothing waits in {', '.join(names)}.", "green")
        script.done(FINE, purged=depths)
    seen = {queue: [what_it_is(message) for message in broker.waiting(queue)] for queue in names}
    what = returns(script, seen)
    # Before anything is gone: what will not come back cannot be had back.
    tell(script, "Would purge" if dry_run else "To be purged:", seen, what, rows, broker)
    if dry_run:
        script.next("the same with --yes, if that is what you want.")
        script.done(FOUND, would_purge=depths, **what)
    lost = f" {said(what['lost'])} will not come back." if what["lost"] else ""
    script.confirm(f"{count(sum(depths.values()), 'message')} will be deleted from {', '.join(names)}.{lost}", yes)
    purged: dict[str, list[tuple[str | None, Any]]] = {queue: [] for queue in names}
    for queue in names:

        def keep(message: Message, queue: str = queue) -> None:
            purged[queue].append(what_it_is(message))

        broker.purge(queue, token_hex(4), keep)
        broker.forget_wake_up(queue)
    what = returns(script, purged)
    script.say(
        f"Purged {count(sum(map(len, purged.values())), 'message')}; {count(what['comes_back'], 'job')} come back."
    )
    script.next(
        "rebuild_queue.py brings the jobs back at once; task_manager.py revoke ID or the API's cancel ends a job."
    )
    script.done(FINE, purged={queue: len(found) for queue, found in purged.items()}, **what)


def what_it_is(message: Message) -> tuple[str | None, Any]:
    """Its task, and the job that it speaks of."""
    return message.task, message.job_id


def returns(script: Script, found: dict[str, list[tuple[str | None, Any]]]) -> dict[str, Any]:
    """What comes back, by what PostgreSQL says of the jobs now."""
    ids = list({job_id for messages in found.values() for _, job_id in messages if job_id})
    status = {row["id"]: row["status"] for row in script.sql(looks.STATUSES, {"ids": ids})}
    others = Counter(task or "not readable" for messages in found.values() for task, job_id in messages if not job_id)
    wake_ups = others.pop(RUN_SHORT_JOBS, 0)
    return {
        "comes_back": sum(status.get(job_id) == "queued" for job_id in ids),
        "not_needed": sum(status.get(job_id) != "queued" for job_id in ids),
        "wake_ups": wake_ups,
        "lost": dict(others),
    }


def said(lost: dict[str, int]) -> str:
    return ", ".join(f"{number} {task}" for task, number in lost.items())


def tell(script: Script, verb: str, found: Any, what: dict[str, Any], rows: Any, broker: Broker) -> None:
    for queue, messages in found.items():
        row = rows[queue]
        behind = row["outside"] + row["short"]
        outside = f"; {behind:,} more jobs wait in PostgreSQL without a message" if behind else ""
        script.say(f"{verb} {count(len(messages), 'message')} of {queue}{outside}.")
    if what["comes_back"]:
        script.say(
            f"Comes back: {count(what['comes_back'], 'job')}, queued in PostgreSQL. Repair sends messages again within "
            f"about {BACK_SECONDS} s (at most {CHECK_SECONDS} s) while beat and worker-maintenance run."
        )
    if what["wake_ups"]:
        script.say("Comes back: the wake-up for short jobs, with the next dispatch in about 2 s, if there are any.")
    if what["not_needed"]:
        script.say(f"Does not: messages of {count(what['not_needed'], 'job')}, running or over; nobody needs them.")
    if what["lost"]:
        script.say(
            f"Does not: {said(what['lost'])}. Maintenance comes again with its next tick; a task of your own is lost.",
            "yellow",
        )
    held = sum(1 for _ in broker.held())
    if held:
        script.say(f"Not touched: {count(held, 'message')} that workers hold.")


if __name__ == "__main__":
    helper.run(main)
