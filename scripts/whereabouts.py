"""Where a job or any other Celery task is: its row, its messages, who holds it, its result; and what that means."""

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from psycopg.rows import DictRow

from app.jobs.messages import RUN_JOB, RUN_SHORT_JOBS
from app.queues import ALL_QUEUES
from app.settings import Settings
from scripts import looks
from scripts.broker import Broker, Held, Message, Worker
from scripts.helper import FINE, FOUND, Script, age, stop

# From the moment a row is marked to the moment when its message is in the list or with a worker.
UNDER_WAY_SECONDS = 15
# A job's id, or that of a message of it, which begins with the job's. Capitals make no other UUID.
JOB_ID = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(:\w+)?", re.IGNORECASE)
# Workers remember this many revoked ids at most; so many in one command.
REVOKE_AT_ONCE = 1000


class Verdict(NamedTuple):
    """What a state means: a word, sentences for people, what to do next, and the exit code for it."""

    state: str
    text: str
    next: str
    code: int


@dataclass
class Whereabouts:
    """All places where a task was found."""

    id: str
    job_id: UUID | None
    row: DictRow | None
    waiting: list[tuple[str, int, Message]] = field(default_factory=list)  # queue, position from 1, message
    held: list[Held] = field(default_factory=list)
    active: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # worker, request
    reserved: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    scheduled: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)  # workers that will not run it
    results: dict[str, tuple[dict[str, Any], int]] = field(default_factory=dict)  # task id -> result, seconds left
    workers: dict[str, Worker] = field(default_factory=dict)
    wake_ups: set[str] = field(default_factory=set)  # queues in which one waits, for whatever short job

    @property
    def celery_ids(self) -> set[str]:
        """Its ids as Celery writes them, which tells capitals apart."""
        return {self.id, *(request["id"] for request in self._requests), *(str(found.id) for found in self._messages)}

    @property
    def tasks(self) -> set[str]:
        """The names of its task."""
        return {request["name"] for request in self._requests} | {str(found.task) for found in self._messages}

    @property
    def _requests(self) -> list[dict[str, Any]]:
        return [request for _, request in (*self.active, *self.reserved, *self.scheduled)]

    @property
    def _messages(self) -> list[Message]:
        return [message for _, _, message in self.waiting] + [held.message for held in self.held]

    @property
    def is_known(self) -> bool:
        found = self.row or self.waiting or self.held or self.active or self.reserved or self.scheduled or self.results
        return bool(found)

    @property
    def is_in_celery(self) -> bool:
        """Somewhere from where it could still run."""
        return bool(self.waiting or self.held or self.active or self.reserved or self.scheduled)

    def consumers(self, queue: str) -> list[str]:
        return [worker.name for worker in self.workers.values() if queue in worker.queues]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": self.id,
            "job_id": self.job_id,
            "job": self.row and {name: self.row[name] for name in ("status", "kind", "queue", "attempt", "worker")},
            "waiting": [{"queue": queue, "position": at, "id": found.id} for queue, at, found in self.waiting],
            "unacked": [{"queue": held.queue, "id": held.message.id, "tag": held.tag} for held in self.held],
            "active": [worker for worker, _ in self.active],
            "reserved": [worker for worker, _ in self.reserved],
            "scheduled": [{"worker": worker, "eta": request.get("eta")} for worker, request in self.scheduled],
            "revoked": self.revoked,
            "results": [
                {"id": name, "status": result.get("status"), "seconds_left": left if left >= 0 else None}
                for name, (result, left) in self.results.items()
            ],
        }


class Survey(NamedTuple):
    """All messages and workers at one moment."""

    workers: dict[str, Worker]
    waiting: list[tuple[str, int, Message]]  # queue, position from 1, message
    held: list[Held]


def survey(script: Script) -> Survey:
    _ = script.database  # whoever is away is named before anything is looked for
    broker = Broker(script.redis, script.celery)
    workers = broker.workers()
    waiting = [(queue, at, message) for queue in ALL_QUEUES for at, message in enumerate(broker.waiting(queue), 1)]
    return Survey(workers, waiting, list(broker.held()))


def read_id(text: str) -> tuple[str, UUID | None]:
    """A task's id, and the job it speaks of if it has the shape of one. Celery takes any text for an id."""
    text = text.strip()
    if not text.isprintable() or not 0 < len(text) <= 200:
        stop(f"{text[:50]!r} is not an id: take a job's id as the API shows it, or a Celery task's.")
    found = JOB_ID.fullmatch(text)
    return text, UUID(found[1]) if found else None


def locate(seen: Survey, names: Iterable[str]) -> list[Whereabouts]:
    """Where each of these is among messages and workers. Rows and results are not looked up."""
    found = []
    wake_ups = {queue for queue, _, message in seen.waiting if message.is_wake_up}
    owners = defaultdict[str, list[Whereabouts]](list)
    for name in names:
        shape = JOB_ID.fullmatch(name)
        job_id = UUID(shape[1]) if shape else None
        found.append(Whereabouts(name, job_id, None, workers=seen.workers, wake_ups=wake_ups))
        owners[name.lower() if shape else name].append(found[-1])

    def whose(celery_id: str | None) -> list[Whereabouts]:
        shape = JOB_ID.fullmatch(celery_id or "")
        names = {shape[0].lower(), shape[1].lower()} if shape else {celery_id or ""}
        return [owner for name in names if name in owners for owner in owners[name]]

    for place in seen.waiting:
        for owner in whose(place[2].id):
            owner.waiting.append(place)
    for held in seen.held:
        for owner in whose(held.message.id):
            owner.held.append(held)
    for worker in seen.workers.values():
        for what in ("active", "reserved", "scheduled"):
            for request in getattr(worker, what):
                for owner in whose(request["id"]):
                    getattr(owner, what).append((worker.name, request))
        for owner in {id(one): one for revoked in worker.revoked for one in whose(revoked)}.values():
            owner.revoked.append(worker.name)
    return found


def find(script: Script, text: str) -> Whereabouts:
    """Looks everywhere.

    Raises:
        SystemExit: with 2: the id is none, a server cannot be reached, or nobody knows the task.
    """
    found = look(script, text)
    if not found.is_known:
        days = script.settings.job_retention_days
        kept = f"jobs are kept {f'{days} days' if days else 'for ever'}"
        stop(
            f"Nobody knows {found.id}: there is no such job in PostgreSQL, no message in Redis, no worker that has it, "
            f"and no result. It never existed, or it was over long ago ({kept}, Celery's results "
            f"{age(script.settings.result_expires)}).",
            state="unknown",
        )
    return found


def look(script: Script, text: str) -> Whereabouts:
    """As `find`, but finding nothing is an answer too."""
    task_id, job_id = read_id(text)
    [found] = locate(survey(script), [task_id])
    # A job's own results are in its row. Of what a message of it left in Celery's, the id would have to be known.
    broker = Broker(script.redis, script.celery, results=script.results)
    for name in found.celery_ids:
        result, left = broker.result(name)
        if result is not None:
            found.results[name] = (result, left)
    # Last: a job may move while this looks, and its row is the truth.
    if job_id:
        found.row = next(iter(script.sql(looks.JOB, {"id": job_id})), None)
    return found


def withdraw(script: Script, tasks: list[Whereabouts]) -> None:
    """Ends Celery tasks: tells all workers to drop them, and takes their messages away, so that a worker that starts
    later finds none. One that runs is stopped with its child."""
    for terminate in (False, True):
        ids = [name for found in tasks if bool(found.active) is terminate for name in found.celery_ids]
        for start in range(0, len(ids), REVOKE_AT_ONCE):
            script.celery.control.revoke(ids[start : start + REVOKE_AT_ONCE], terminate=terminate)
    take_away(script, tasks)


def take_away(script: Script, tasks: list[Whereabouts]) -> None:
    """Their messages, waiting ones and those that a worker has: that one does not notice."""
    broker = Broker(script.redis, script.celery)
    broker.remove((message, 0) for found in tasks for _, _, message in found.waiting)
    broker.drop_held(held.tag for found in tasks for held in found.held)


def judge(found: Whereabouts, settings: Settings) -> Verdict:
    """What its state means and what to do about it."""
    if found.row is None:
        return _task(found)
    status = found.row["status"]
    if status == "queued":
        return _queued(found, found.row)
    if status == "running":
        return _running(found.row, settings)
    row = found.row
    over = f"It ended {age(row['finished_age'])} ago, after {row['attempt']} of {row['max_attempts']} runs."
    if status == "failed":
        why = f"{row['error']['type']}: {row['error']['message']}"
        return Verdict("failed", f"{over} {why}", "mend the cause, then POST /api/jobs/ID/retry runs it again.", FOUND)
    left = f" {len(found.waiting)} of its messages still wait; workers drop them." if found.waiting else ""
    hint = "nothing; its result is in its row."
    if status == "cancelled":
        hint = "nothing; POST /api/jobs/ID/retry runs it again."
    if found.waiting:
        hint = "task_manager.py cleanup ID takes them away."
    return Verdict(status, over + left, hint, FINE)


def _queued(found: Whereabouts, row: DictRow) -> Verdict:
    queue, consumers = row["queue"], found.consumers(row["queue"])
    nobody = f"no worker that answers consumes {queue}: make ps, or start_celery_worker.sh {queue}"
    if row["due_in"] > 0:
        if row["attempt"]:
            why = f"{row['error']['type']}: {row['error']['message']}" if row["error"] else "its worker was lost"
            text = (
                f"It will be retried in {age(row['due_in'])}, run {row['attempt'] + 1} of {row['max_attempts']}; {why}"
            )
            return Verdict("waits for its retry", text, "wait; or stop_retries.py ID ends it.", FINE)
        text = f"It was asked for at {row['run_at']:%Y-%m-%d %H:%M:%S} UTC, in {age(row['due_in'])}."
        return Verdict("waits for its time", text, "wait; or task_manager.py revoke ID.", FINE)
    if found.active or found.reserved or found.held:
        holder = next((worker for worker, _ in [*found.active, *found.reserved]), None)
        just_now = any(time.time() - held.since < UNDER_WAY_SECONDS for held in found.held)
        if holder or just_now:
            holder = holder or "A worker"
            return Verdict("taken", f"{holder} has its message and is about to run it.", "look again.", FINE)
        text = "Its message is unacknowledged, and no worker that answers has it: the one that took it is gone."
        return Verdict("lost", text, f"wait a minute (repair sends another), or rebuild_queue.py {queue} now.", FOUND)
    if found.waiting:
        where, position, _ = found.waiting[0]
        copies = f" (and {len(found.waiting) - 1} copies behind it)" if len(found.waiting) > 1 else ""
        text = f"Its message is number {position} in {where}{copies}; consumed by {', '.join(consumers) or 'nobody'}."
        return Verdict("waits in its queue", text, "wait." if consumers else nobody, FINE if consumers else FOUND)
    if row["short"]:
        return _short(queue, consumers, nobody, is_woken=queue in found.wake_ups)
    if row["published_at"] is None:
        text = (
            f"It has no message yet: dispatch sends it within 2 s, the oldest first, if {queue} has room in its window."
        )
        return Verdict("waits for dispatch", text, "wait; if it does not move: debug_beat_service.py", FINE)
    if row["published_age"] < UNDER_WAY_SECONDS:
        return Verdict("under way", "Its message was sent just now.", "look again in 15 s.", FINE)
    text = f"Its message was sent {age(row['published_age'])} ago and is nowhere: Redis lost it, or its worker died."
    return Verdict("lost", text, f"wait a minute (repair sends another), or rebuild_queue.py {queue} now.", FOUND)


def _short(queue: str, consumers: list[str], nobody: str, *, is_woken: bool) -> Verdict:
    text = (
        f"It is short and needs no message of its own: whoever is woken up takes up to 100 such jobs of {queue} at a "
        f"time, the oldest first. {'A wake-up waits' if is_woken else 'Dispatch sends a wake-up within 2 s'}; "
        f"consumed by {', '.join(consumers) or 'nobody'}."
    )
    if not consumers:
        return Verdict("waits for its group", text, nobody, FOUND)
    return Verdict("waits for its group", text, "wait; if it does not move: debug_beat_service.py", FINE)


def _running(row: DictRow, settings: Settings) -> Verdict:
    text = (
        f"{row['worker']} runs it (child {row['pid']}), run {row['attempt']} of {row['max_attempts']}; "
        f"last heartbeat {age(row['heartbeat_age'])} ago."
    )
    if row["lease_left"] < 0:
        text += f" Its lease ran out {age(-row['lease_left'])} ago: the worker is dead or cut off."
        return Verdict("abandoned", text, "rescue takes it within 10 s; if it stays: debug_beat_service.py", FOUND)
    if row["cancel_requested_at"] is not None:
        text += (
            f" A cancel was recorded {age(row['cancel_age'])} ago: it ends at its next checkpoint, by force after "
            f"{settings.cancel_grace_seconds:g} s, and can't succeed any more."
        )
        return Verdict("being cancelled", text, "look again.", FINE)
    return Verdict("running", text, "wait; or task_manager.py revoke ID.", FINE)


def _task(found: Whereabouts) -> Verdict:
    """A Celery task that is no job, or a message whose job is gone."""
    gone, tasks = "", found.tasks
    if RUN_JOB in tasks:
        gone = " It speaks of a job that is not in PostgreSQL: a worker will drop it."
    if RUN_SHORT_JOBS in tasks:
        gone = " It wakes a worker up for short jobs, and nothing is lost with it: dispatch sends another."
    if found.active:
        return Verdict("STARTED", f"{found.active[0][0]} runs it.{gone}", "wait; or task_manager.py revoke ID.", FINE)
    held_by = found.scheduled or found.reserved
    if held_by:
        worker, request = held_by[0]
        when = f" until {request['eta']}" if found.scheduled else ""
        if worker in found.revoked:
            text = f"{worker} holds it{when} and will then drop it: it is revoked."
            return Verdict("REVOKED", text, "nothing.", FINE)
        text = f"{worker} holds it{when}.{gone}"
        return Verdict("PENDING", text, "wait; or stop_retries.py ID ends it.", FINE)
    if found.waiting:
        queue, position, message = found.waiting[0]
        consumers = found.consumers(queue)
        text = f"{message.task}, number {position} in {queue}; consumed by {', '.join(consumers) or 'nobody'}.{gone}"
        hint = "wait; or task_manager.py revoke ID." if consumers else f"start_celery_worker.sh {queue}"
        return Verdict("PENDING", text, hint, FINE if consumers else FOUND)
    if found.held:
        since = found.held[0]
        text = (
            f"It is unacknowledged ({since.message.task}) and no worker that answers has it: the one that did is gone."
        )
        hint = "Redis hands it out again after the visibility timeout; stop_retries.py ID takes it away."
        return Verdict("PENDING", text + gone, hint, FOUND)
    if not found.results:
        return Verdict("gone", "It is nowhere any more.", "nothing.", FINE)
    [(result, left), *_] = found.results.values()
    status = str(result.get("status"))
    kept = f"Redis forgets this in {age(left)}." if left >= 0 else "Redis never forgets this: cleanup_redis_manual.py"
    failed = status not in ("SUCCESS", "REVOKED", "IGNORED")
    error = result.get("result") if failed else None
    said = f" {error.get('exc_type')}: {error.get('exc_message')}" if isinstance(error, dict) else ""
    return Verdict(status, f"It is over: {status}.{said} {kept}", "nothing.", FOUND if failed else FINE)
