"""Leaves one message a job in the queues, the oldest, and none for jobs that are over. Workers may go on meanwhile.

Duplicates do no harm but fill Redis: whoever takes the second one finds the job claimed.

python scripts/purge_celery_duplicates.py default
"""

import sys
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts import helper, looks
from scripts.broker import Broker, Message
from scripts.helper import FINE, FOUND, AsJson, DryRun, Queues, Script, Yes, count

IDS_AT_ONCE = 5000


def main(queues: Queues = None, as_json: AsJson = False, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Exits 0: done, or there are none. 1 with --dry-run: there are some."""
    script = Script(as_json)
    broker = Broker(script.redis, script.celery)
    plans = {queue: plan(script, broker.waiting(queue)) for queue in script.queues(queues)}
    found = {queue: counted for queue, (_, counted) in plans.items()}
    total = sum(sum(counted.values()) for counted in found.values())
    for queue, what in found.items():
        wake_ups = f", {count(what['wake_ups'], 'needless wake-up')}" if what["wake_ups"] else ""
        script.say(
            f"{queue}: {count(what['duplicates'], 'duplicate')}, "
            f"{what['finished']} of jobs that are over or gone{wake_ups}."
        )
    if not total:
        script.next("nothing: each message is needed.")
        script.done(FINE, removed=0, found=found)
    if dry_run:
        script.next("the same without --dry-run.")
        script.done(FOUND, would_remove=found)
    script.confirm(f"{count(total, 'message')} will be removed; no job loses its last one.", yes)
    removed = sum(broker.remove(unwanted) for unwanted, _ in plans.values())
    script.say(f"Removed {count(removed, 'message')}.")
    if removed < total:
        script.say(f"Workers took the other {total - removed} meanwhile, and dropped them.")
    script.next("if duplicates come again, is a worker cut off? doctor.py")
    script.done(FINE, removed=removed, found=found)


def plan(script: Script, waiting: list[Message]) -> tuple[list[tuple[Message, int]], dict[str, int]]:
    """What to remove from a queue, given next one first: [(message, how many copies)], and how many of which sort.

    Copies that are equal byte for byte (a message that was replayed) are removed youngest first, so the oldest stays in
    its place. A worker that takes it in between has the job: then none is needed. One wake-up does for all short jobs.
    """
    ids = list({message.job_id for message in waiting if message.job_id})
    status: dict[UUID, str] = {}
    # Once at least: without PostgreSQL nobody knows anything of a queue, not even of an empty one.
    for start in range(0, len(ids) or 1, IDS_AT_ONCE):
        rows = script.sql(looks.STATUSES, {"ids": ids[start : start + IDS_AT_ONCE]})
        status |= {row["id"]: row["status"] for row in rows}
    needed: set[Hashable] = set()
    unwanted: Counter[tuple[str, bytes]] = Counter()
    example: dict[tuple[str, bytes], Message] = {}
    counted = {"duplicates": 0, "finished": 0, "wake_ups": 0}
    for message in waiting:
        example.setdefault((message.key, message.raw), message)
        if message.job_id and status.get(message.job_id, "succeeded") in looks.OVER:
            counted["finished"] += 1
        elif message.whose in needed:
            counted["wake_ups" if message.is_wake_up else "duplicates"] += 1
        else:
            needed.add(message.whose)
            continue
        unwanted[message.key, message.raw] += 1
    return [(example[which], copies) for which, copies in unwanted.items()][::-1], counted


if __name__ == "__main__":
    helper.run(main)
