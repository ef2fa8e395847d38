"""The messages that wake workers up, written straight into Redis.

A message says "job X may be due" and nothing else: all that matters is on the job's row, so messages may get lost, come
twice or be replayed. They have Celery's format (protocol 2 in kombu's Redis envelope), but many go out in one command,
with our own time limits: `send_task` takes 0.6 ms of Python each and, with Redis frozen, as long as it likes.
"""

import base64
import json
import secrets
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.jobs.kinds import all_kinds
from app.queues import MAINTENANCE
from app.settings import Settings, split_redis_url

RUN_JOB = "run_job"
RUN_SHORT_JOBS = "run_short_jobs"
# A wake-up that got lost is missed for so long.
WAKE_SECONDS = 10
# One more comes each time that one was missed: where nobody consumes the queue, Redis would fill up with them. Far
# above the window, since a list that others keep full must not shut them out.
MOST_WINDOWS = 10
WAKE = """
if redis.call('llen', KEYS[1]) < tonumber(ARGV[1]) and redis.call('set', KEYS[2], '1', 'nx', 'ex', ARGV[2]) then
    redis.call('lpush', KEYS[1], ARGV[3])
end
"""
# With this many messages in `maintenance` nobody consumes it; more would only fill Redis.
MOST_MAINTENANCE = 100
REDIS_ERRORS = (redis.RedisError, OSError)


class Address(NamedTuple):
    """What a message needs to know of a job."""

    id: UUID
    kind: str
    queue: str


def envelope(task: str, queue: str, task_id: str, args: list[str], **headers: Any) -> str:
    """One message as kombu stores it in a Redis list."""
    return json.dumps(
        {
            "body": _body(args),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "eta": None,
                "expires": None,
                "timelimit": [None, None],
                "argsrepr": repr(args),
                "kwargsrepr": "{}",
                "origin": "jobstack",
                "ignore_result": True,
            }
            | headers,
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": secrets.token_hex(16),
            },
        }
    )


def _body(args: list[str]) -> str:
    return base64.b64encode(json.dumps([args, {}, {}]).encode()).decode()


@cache
def _job_template(queue: str, hard: int) -> str:
    """To be filled in for each job. Most of a message is the same for all, and there are a thousand in a window."""
    job_id = "%(job_id)s"
    message = envelope(RUN_JOB, queue, "%(task_id)s", [job_id], timelimit=[hard or None, None])
    tag = json.loads(message)["properties"]["delivery_tag"]
    return message.replace(_body([job_id]), "%(body)s").replace(tag, "%(tag)s")


def job_message(job: Address, settings: Settings) -> str:
    """A `run_job` message.

    Its task id begins with the job's id, for Flower, `inspect` and the scripts. The rest makes it new every time, since
    workers remember a revoked id and would silently drop a job that was cancelled and then retried.
    """
    kind = all_kinds().get(job.kind)
    # The soft limit is the runner's: it must be disarmed while a step is recorded. The hard one is the parent's.
    hard = kind.limits(settings)[1] if kind else 0
    job_id = str(job.id)
    return _job_template(job.queue, hard) % {
        "job_id": job_id,
        "task_id": f"{job_id}:{secrets.token_hex(4)}",
        "body": _body([job_id]),
        "tag": secrets.token_hex(16),
    }


def wake_key(queue: str) -> str:
    """Is there while a wake-up of that queue waits. Its worker deletes it before it looks for jobs."""
    return f"jobstack:wake:{queue}"


def wake_up(queue: str, settings: Settings) -> tuple[str | int, ...]:
    """The arguments of an EVAL that makes sure that a message waits by which a worker looks for short jobs.

    They need no message each: which jobs are due stands in the table.
    """
    task_id = f"short:{queue}:{secrets.token_hex(8)}"
    # The worker itself ends a job that is not short. This is for one that holds the interpreter, and leaves the time to
    # write results down after PostgreSQL was away.
    message = envelope(RUN_SHORT_JOBS, queue, task_id, [queue], timelimit=[settings.job_time_limit or None, None])
    return (WAKE, 2, queue, wake_key(queue), settings.queue_window * MOST_WINDOWS, WAKE_SECONDS, message)


def job_id_of(message: bytes | str) -> UUID | None:
    """The job that a message in a list speaks of; None if it isn't one of ours."""
    try:
        return UUID(json.loads(message)["headers"]["id"][:36])
    except (ValueError, KeyError, TypeError):
        return None


def by_queue(jobs: Iterable[Address], settings: Settings) -> dict[str, list[str]]:
    """Messages for each queue, in the order of `jobs`."""
    messages = defaultdict(list)
    for job in jobs:
        messages[job.queue].append(job_message(job, settings))
    return messages


def maintenance_message(task: str, *args: str) -> str:
    """Asks the maintenance worker for a run whose result nobody reads. `args`: the tick's time, if there is one.

    It does not expire: that is measured with two machines' clocks, and one that is off would drop every tick. Whether
    it is too late is decided by the tick's row.
    """
    return envelope(task, MAINTENANCE, secrets.token_hex(16), list(args))


def _options(settings: Settings, seconds: float) -> tuple[str, dict[str, Any]]:
    url, tls = split_redis_url(settings.broker_url)
    # No retries inside the client: a send that failed is repaired from PostgreSQL.
    limits = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": Retry(NoBackoff(), 0)}
    return url, {**limits, "health_check_interval": 30, **tls}


def connect(settings: Settings, *, seconds: float = 2) -> redis.Redis:
    """A client whose every command ends within `seconds`."""
    url, options = _options(settings, seconds)
    return redis.Redis.from_url(url, **options)


def connect_async(settings: Settings, *, seconds: float = 0.8) -> redis.asyncio.Redis:
    """The API's client."""
    url, options = _options(settings, seconds)
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, **options | {"retry": AsyncRetry(NoBackoff(), 0)})
    return client
