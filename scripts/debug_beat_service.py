"""Does the house-keeping happen? Which entry was due when, was sent, started, ended how; and if not, why not.

python scripts/debug_beat_service.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

sys.path.insert(0, str(Path(__file__).parent.parent))

from psycopg.rows import DictRow

from app import ticks
from app.jobs import messages
from app.queues import MAINTENANCE
from app.schedule import SCHEDULE, SLACK, Entry
from app.settings import get_settings
from scripts import helper, looks
from scripts.broker import Broker, Worker
from scripts.helper import COULD_NOT, FINE, FOUND, AsJson, Script, Unreachable, age, stop

# A beat that was just restarted has no connection for a moment.
RESTART_SECONDS = 8


@dataclass
class Seen:
    """What there is to see of beat. `connected`: seconds since beat's oldest connection; None if it has none."""

    entries: list[tuple[Entry, DictRow, Any]]  # the entry, its newest tick, when it was due last
    connected: float | None
    waiting: int
    workers: dict[str, Worker]

    @property
    def consumers(self) -> list[str]:
        return [worker.name for worker in self.workers.values() if MAINTENANCE in worker.queues]


@dataclass
class Diagnosis:
    """`what` is one of: fine, unreachable, beat not running, beat not scheduling, queue not consumed, tasks failing."""

    what: str
    text: str
    fix: str
    code: int = FOUND


def main(as_json: AsJson = False) -> None:
    """Exits 0: it does. 1: it does not, with the reason and its remedy. 2: PostgreSQL or Redis does not answer."""
    script = Script(as_json)
    if script.settings.jobs_execution == "inline":
        stop("JOBS_EXECUTION=inline: the API does the house-keeping itself, there is no beat.")
    seen: Seen | None = None
    try:
        script.database, script.redis = script.open_database(), script.open_redis()
        seen = look(script)
        diagnosis = diagnose(seen)
        show(script, seen)
    except Unreachable as error:
        diagnosis = Diagnosis("unreachable", str(error), error.fix, COULD_NOT)
    script.say(f"Diagnosis: {diagnosis.what}. {diagnosis.text}", "green" if diagnosis.code == FINE else "red")
    script.next(diagnosis.fix)
    script.done(
        diagnosis.code,
        diagnosis=diagnosis.what,
        message=diagnosis.text,
        fix=diagnosis.fix,
        entries=[{**tick, "due_last": due, "late": is_late(entry, tick)} for entry, tick, due in seen.entries]
        if seen
        else [],
        beat_connected_seconds=seen and seen.connected,
        waiting=seen and seen.waiting,
        consumers=seen.consumers if seen else [],
    )


def look(script: Script) -> Seen:
    zone = ZoneInfo(script.settings.schedule_timezone)
    rows = script.sql(looks.NEWEST_TICKS, {"entries": [entry.task for entry in SCHEDULE]})
    entries = [(entry, row, entry.latest(row["now"], zone)) for entry, row in zip(SCHEDULE, rows, strict=True)]
    connections = {row["application_name"]: row["oldest_age"] for row in script.sql(looks.CONNECTIONS, {})}
    broker = Broker(script.redis, script.celery)
    waiting = broker.depths([MAINTENANCE])[MAINTENANCE]
    return Seen(entries, connections.get("jobstack-beat"), waiting, broker.workers())


def is_late(entry: Entry, tick: DictRow) -> bool:
    zone = ZoneInfo(get_settings().schedule_timezone)
    return entry.is_late(tick["now"], zone, tick["due_at"], tick["sent_at"])


def diagnose(seen: Seen) -> Diagnosis:
    """The first of the reasons, from beat to the task, that fits."""
    late = [entry.task for entry, tick, _ in seen.entries if is_late(entry, tick)]
    sent = min((tick["sent_age"] for _, tick, _ in seen.entries if tick["sent_age"] is not None), default=None)
    if seen.connected is None and (late or sent is None or sent > RESTART_SECONDS):
        text = f"It has no connection to PostgreSQL; the last tick was sent {age(sent)}{' ago' if sent else ''}."
        return Diagnosis(
            "beat not running", text, "start it: make ps, make logs SERVICE=beat, docker compose up -d beat"
        )
    who, full = ", ".join(seen.consumers), seen.waiting >= messages.MOST_MAINTENANCE
    if not who and (full or is_not_started(seen)):
        text = f"No worker that answers consumes {MAINTENANCE}; {seen.waiting} messages wait."
        hint = "start it: make ps, docker compose up -d worker-maintenance, or start_celery_worker.sh maintenance"
        return Diagnosis("queue not consumed", text, hint)
    if full:
        text = f"{seen.waiting} messages wait in {MAINTENANCE}, so beat sends no more; {who} is too slow."
        return Diagnosis("queue not consumed", text, "doctor.py shows what it does; purge_celery_queue.py maintenance")
    if late:
        text = f"Beat is connected and has not sent {', '.join(late)}, which is due."
        return Diagnosis("beat not scheduling", text, "make logs SERVICE=beat; restart it: docker compose restart beat")
    failing = [tick for _, tick, _ in seen.entries if tick["error"] and not tick["finished_at"]]
    if failing:
        text = "; ".join(f"{tick['entry']}: {tick['error']}" for tick in failing)
        return Diagnosis("tasks failing", text, f"trigger_cleanup_manual.py {failing[0]['entry']} runs it here.")
    stuck = [tick for _, tick, _ in seen.entries if is_stuck(tick)]
    if stuck:
        text = f"{stuck[0]['entry']} was started {age(stuck[0]['started_age'])} ago and has not ended."
        return Diagnosis(
            "tasks failing", text, "it counts as lost and is sent again; make logs SERVICE=worker-maintenance"
        )
    if is_not_started(seen):
        text = f"{who} consumes {MAINTENANCE}, and starts nothing."
        return Diagnosis("queue not consumed", text, "doctor.py shows what it does; restart worker-maintenance")
    text = f"Every entry is on time; {who} consumes." if who else "Ticks are started, but no worker answers just now."
    return Diagnosis("fine", text, "nothing." if who else "look again.", FINE)


def is_not_started(seen: Seen) -> bool:
    """Something that is due all the time was sent, again and again, and nobody began it."""
    return any(
        entry.frequent and tick["due_at"] and not tick["started_at"] and tick["now"] - tick["due_at"] > SLACK
        for entry, tick, _ in seen.entries
    )


def is_stuck(tick: DictRow) -> bool:
    started = tick["started_at"] is not None and tick["finished_at"] is None
    return bool(started and tick["started_age"] > ticks.LOST_SECONDS)


def show(script: Script, seen: Seen) -> None:
    rows = []
    for entry, tick, due in seen.entries:
        result = tick["error"] or ("" if tick["finished_at"] is None else tick["result"] or "nothing to do")
        cells = (
            entry.task,
            f"{age((tick['now'] - due).total_seconds())} ago",
            "never" if tick["due_at"] is None else f"{tick['due_at']:%m-%d %H:%M:%S}",
            "no" if tick["sent_at"] is None else f"{age(tick['sent_age'])} ago",
            "no" if tick["started_at"] is None else f"{age(tick['started_age'])} ago",
            str(result),
        )
        rows.append((cells, "red" if is_late(entry, tick) or tick["error"] else ""))
    script.table(("entry", "due last", "newest tick", "sent", "started", "result"), rows)
    beat = "not connected" if seen.connected is None else f"connected to PostgreSQL for {age(seen.connected)}"
    script.say(
        f"beat: {beat}. {MAINTENANCE}: {seen.waiting} waiting, consumed by {', '.join(seen.consumers) or 'nobody'}."
    )
    for name in seen.consumers:
        worker = seen.workers[name]
        running = [request["name"] for request in worker.active]
        script.say(f"  {name} runs {', '.join(running) or 'nothing'}; {len(worker.reserved)} reserved")


if __name__ == "__main__":
    helper.run(main)
