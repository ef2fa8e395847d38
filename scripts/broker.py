"""Celery's messages and results in Redis, looked at and taken away while workers run.

Whatever else lives in that Redis is neither read nor touched, such as another Celery application's keys behind a
`global_keyprefix`. We have none: our messages are written without Celery, which knows it (`Script.celery` refuses it).
A queue is up to four lists, one for each of Celery's priorities; ours all have priority 0, an owner's tasks may not.
"""

import json
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from secrets import token_hex
from typing import Any, NamedTuple
from uuid import UUID

from app.jobs.messages import RUN_JOB, RUN_SHORT_JOBS, envelope, job_id_of, wake_key

# Redis is asked for so many things at a time: more would keep everybody else waiting.
BATCH = 500
# So many messages from each end of a list are looked at where all might be too many: a whole window may lie on one.
NEAR = 1000
WORKER_SECONDS = 1.0
RESULT_PREFIX = "celery-task-meta-"

# Atomic: what a worker or a publisher does in between comes before or after. The list is set aside under a name that
# nobody consumes and that goes by itself, should the script die before it has looked through it.
_SET_ASIDE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('EXPIRE', KEYS[2], 600)
return redis.call('LLEN', KEYS[2])
"""


class Message(NamedTuple):
    """A message of Celery's. `id` is its task id, `job_id` the job if it speaks of one; None where it can't be read.

    A wake-up speaks of no job: the worker that takes it looks in PostgreSQL for short ones.
    """

    key: str
    raw: bytes
    id: str | None
    task: str | None
    eta: str | None
    retries: int
    job_id: UUID | None

    @property
    def is_wake_up(self) -> bool:
        return self.task == RUN_SHORT_JOBS

    @property
    def whose(self) -> Hashable:
        """What it is about: copies of a message agree in this, and so do the wake-ups of a queue.

        An id is not enough for an owner's tasks: Celery takes any, also the same one for other arguments.
        """
        if self.is_wake_up:
            return RUN_SHORT_JOBS
        if self.job_id or self.id is None:
            return self.job_id or self.raw
        return self.task, self.id, self.eta, self.retries, json.dumps(json.loads(self.raw).get("body"))


class Held(NamedTuple):
    """A message that a worker took and has not acknowledged. `since` in seconds of Unix time."""

    tag: str
    since: float
    queue: str
    message: Message


class Worker(NamedTuple):
    """What a worker says of itself. The lists hold Celery's descriptions of requests."""

    name: str
    queues: list[str]
    active: list[dict[str, Any]]
    reserved: list[dict[str, Any]]
    scheduled: list[dict[str, Any]]
    revoked: list[str]


class Trip(NamedTuple):
    """A task's way through broker and worker, in seconds from the start; `taken` is None if no worker took it."""

    id: str
    sent: float
    taken: float | None
    passed: float
    result: dict[str, Any] | None

    @property
    def worked(self) -> bool:
        return self.result is not None and self.result.get("status") == "SUCCESS"

    @property
    def why(self) -> str:
        """Why it did not work."""
        if self.result is None:
            return "no worker took it" if self.taken is None else "a worker took it and gave no result"
        error = self.result.get("result")
        return f"{error.get('exc_type')}: {error.get('exc_message')}" if isinstance(error, dict) else str(error)


def parse(key: str, raw: bytes) -> Message:
    try:
        headers = json.loads(raw)["headers"]
        task_id, task, eta = headers["id"], headers["task"], headers.get("eta")
        job_id = job_id_of(raw) if task == RUN_JOB else None
        return Message(key, raw, str(task_id), str(task), eta, int(headers.get("retries") or 0), job_id)
    except (ValueError, KeyError, TypeError):
        return Message(key, raw, None, None, None, 0, None)


class Broker:
    """The keys of one Celery application in one Redis."""

    def __init__(self, client: Any, celery: Any, *, results: Any = None) -> None:
        options = celery.conf.broker_transport_options
        self.client, self._celery = client, celery
        self.results = client if results is None else results
        self._separator: str = options.get("sep", "\x06\x16")
        self._steps: list[int] = options.get("priority_steps", [0, 3, 6, 9])
        self.unacked: str = options.get("unacked_key", "unacked")
        self.unacked_index: str = options.get("unacked_index_key", "unacked_index")

    # --- looking ---

    def lists(self, queue: str) -> list[str]:
        """The keys of a queue, in the order in which workers empty them."""
        return [f"{queue}{f'{self._separator}{step}' if step else ''}" for step in self._steps]

    def depths(self, queues: Iterable[str]) -> dict[str, int]:
        """Messages that wait, by queue."""
        queues = list(queues)
        pipe = self.client.pipeline(transaction=False)
        for queue in queues:
            for key in self.lists(queue):
                pipe.llen(key)
        lengths, each = pipe.execute(), len(self._steps)
        return {queue: sum(lengths[at * each : (at + 1) * each]) for at, queue in enumerate(queues)}

    def waiting(self, queue: str) -> list[Message]:
        """The messages that wait, the next one first: all lists as they are at one moment."""
        pipe = self.client.pipeline(transaction=True)
        for key in self.lists(queue):
            pipe.lrange(key, 0, -1)
        found = zip(self.lists(queue), pipe.execute(), strict=True)
        return [parse(key, raw) for key, messages in found for raw in reversed(messages)]

    def has_wake_up(self, queue: str) -> bool:
        """Whether one lies near the ends of a list: it is sent anew all the time, and a list may be of any length."""
        pipe = self.client.pipeline(transaction=True)
        for key in self.lists(queue):
            pipe.lrange(key, 0, NEAR - 1).lrange(key, -NEAR, -1)
        return any(parse(queue, raw).is_wake_up for messages in pipe.execute() for raw in messages)

    def held(self) -> Iterator[Held]:
        """What workers have not acknowledged; also what dead ones left behind."""
        since = dict(self.client.zscan_iter(self.unacked_index, count=BATCH))
        for tag, entry in self.client.hscan_iter(self.unacked, count=BATCH):
            try:
                payload, _, routing_key = json.loads(entry)
            except (ValueError, TypeError):
                continue
            message = parse(self.unacked, json.dumps(payload).encode())
            yield Held(tag.decode(), since.get(tag, 0.0), str(routing_key), message)

    def result(self, task_id: str) -> tuple[dict[str, Any] | None, int]:
        """A task's stored result, and the seconds until Redis forgets it; -1 if it never does, -2 if there is none."""
        key = RESULT_PREFIX + task_id
        pipe = self.results.pipeline(transaction=True)
        stored, left = pipe.get(key).ttl(key).execute()
        try:
            return (json.loads(stored) if stored else None), left
        except ValueError:
            return {"status": "unreadable"}, left

    def workers(self) -> dict[str, Worker]:
        """What the workers that answer within a second say, by name. An empty answer: none lives, or none listens."""
        names = [next(iter(answer)) for answer in self._celery.control.ping(timeout=WORKER_SECONDS)]
        if not names:
            return {}
        # As soon as all have answered, and not when the time is over.
        ask = self._celery.control.inspect(names, timeout=2 * WORKER_SECONDS, limit=len(names))
        queues, active, reserved = ask.active_queues() or {}, ask.active() or {}, ask.reserved() or {}
        scheduled, revoked = ask.scheduled() or {}, ask.revoked() or {}
        return {
            name: Worker(
                name,
                [queue["name"] for queue in queues.get(name) or ()],
                active.get(name) or [],
                reserved.get(name) or [],
                [item["request"] | {"eta": item["eta"]} for item in scheduled.get(name) or ()],
                list(revoked.get(name) or ()),
            )
            for name in sorted(names)
        }

    # --- sending ---

    def send_and_wait(self, task: str, queue: str, *, seconds: float) -> Trip:
        """Sends a task, as the API does, and waits for its result, which is then forgotten. A message that nobody took
        in that time is taken back: it must not run when its sender is long gone."""
        key, task_id = self.lists(queue)[0], token_hex(16)
        message = envelope(task, queue, task_id, [], ignore_result=False)
        began = time.monotonic()
        self.client.lpush(key, message)
        sent = time.monotonic() - began
        taken = None
        while True:
            if taken is None and self.client.lpos(key, message) is None:
                taken = time.monotonic() - began
            result, _ = self.result(task_id)
            passed = time.monotonic() - began
            if result is not None or passed > seconds:
                break
            time.sleep(0.005 if passed < 1 else 0.1)
        if result is not None:
            self.forget_result(task_id)
        elif taken is None:
            self.client.lrem(key, 1, message)
        return Trip(task_id, sent, taken, passed, result)

    # --- taking away ---

    def remove(self, unwanted: Iterable[tuple[Message, int]]) -> int:
        """Removes so many copies of each message from its list, the youngest first; returns how many there were."""
        removed, batch = 0, list(unwanted)
        for start in range(0, len(batch), BATCH):
            pipe = self.client.pipeline(transaction=False)
            for message, copies in batch[start : start + BATCH]:
                # By value and not by position: positions move while workers work.
                pipe.lrem(message.key, copies, message.raw)
            removed += sum(pipe.execute())
        return removed

    def drop_held(self, tags: Iterable[str]) -> int:
        """Takes messages out of `unacked`, so that no worker gets them again. A worker that has one does not notice."""
        dropped, tags = 0, list(tags)
        for start in range(0, len(tags), BATCH):
            batch = tags[start : start + BATCH]
            pipe = self.client.pipeline(transaction=True)
            dropped += pipe.hdel(self.unacked, *batch).zrem(self.unacked_index, *batch).execute()[0]
        return dropped

    def purge(self, queue: str, name: str, see: Callable[[Message], None]) -> int:
        """Empties a queue, shows each message that was in it to `see`, returns how many. `name` makes keys unique."""
        purged = 0
        for number, key in enumerate(self.lists(queue)):
            aside = f"jobstack:purged:{name}:{queue}:{number}"
            length = self.client.eval(_SET_ASIDE, 2, key, aside)
            for start in range(0, length, BATCH):
                for raw in self.client.lrange(aside, start, start + BATCH - 1):
                    see(parse(key, raw))
            self.client.unlink(aside)
            purged += length
        return purged

    def forget_wake_up(self, queue: str) -> None:
        """For one that is no more: else the next is sent only when its key has expired."""
        self.client.unlink(wake_key(queue))

    def forget_result(self, task_id: str) -> bool:
        return bool(self.results.unlink(RESULT_PREFIX + task_id))
