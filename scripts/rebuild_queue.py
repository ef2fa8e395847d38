"""Makes the queues in Redis from what PostgreSQL says, now: after Redis lost its data, or a purge that went wrong.

It happens by itself within seconds while beat and worker-maintenance run; this does it without them.

python scripts/rebuild_queue.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from app.jobs import dispatch, statements
from app.queues import JOB_QUEUES, MAINTENANCE
from scripts import helper, looks
from scripts.broker import Broker
from scripts.helper import FINE, FOUND, AsJson, DryRun, Queues, Script, count, stop


def main(queues: Queues = None, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Exits 0: each due job has its message, up to the window. 1 with --dry-run: some have none. Deletes nothing."""
    script = Script(as_json)
    if queues == [MAINTENANCE]:
        stop(f"{MAINTENANCE} holds beat's ticks and no jobs: it fills by itself while beat runs. debug_beat_service.py")
    names = [queue for queue in script.queues(queues, JOB_QUEUES) if queue != MAINTENANCE]
    broker = Broker(script.redis, script.celery)
    missing = _missing(script, broker, names)
    rows = {row["queue"]: row for row in script.sql(looks.QUEUED, {"queues": names})}
    window = script.settings.queue_window
    new = {queue: min(row["outside"], max(0, window - row["published"])) for queue, row in rows.items()}
    # Short jobs have no messages; one wake-up a queue does for all of them.
    asleep = [queue for queue, row in rows.items() if row["short"] and not broker.has_wake_up(queue)]
    for queue in names:
        short = rows[queue]["short"]
        woken = f"; {count(short, 'short job')}, {'no' if queue in asleep else 'a'} wake-up" if short else ""
        script.say(f"{queue}: {count(missing[queue], 'message')} lost, {new[queue]} not sent yet{woken}.")
    if dry_run:
        would = any(missing.values()) or any(new.values()) or asleep
        script.next(
            "the same without --dry-run." if would else "nothing: each due job has its message, or waits in turn."
        )
        script.done(FOUND if would else FINE, would_repair=missing, would_publish=new, would_wake=asleep)
    for queue in asleep:
        broker.forget_wake_up(queue)
    done = dispatch.rebuild(script.database, script.redis, script.settings, names)
    depths = broker.depths(names)
    script.say(f"Sent {count(done['published'], 'new message')}, {done['repaired']} again.")
    for queue in names:
        behind = rows[queue]["outside"] - new[queue]
        waits = f"; {behind} more jobs follow as it empties" if behind else ""
        script.say(f"{queue} holds {count(depths[queue], 'message')} now{waits}.")
    script.next("doctor.py, if the queues do not get shorter.")
    script.done(FINE, **done, woken=asleep, messages=depths)


def _missing(script: Script, broker: Broker, queues: list[str]) -> dict[str, int]:
    """Rows whose message was sent and does not wait: lost, or just now with a worker, where a copy does no harm."""
    missing = dict.fromkeys(queues, 0)
    for row in script.sql(statements.SETTLED, {"queues": queues, "settle": 0}):
        present = {message.job_id for message in broker.waiting(row["queue"])}
        missing[row["queue"]] = len(set(row["ids"]) - present)
    return missing


if __name__ == "__main__":
    helper.run(main)
