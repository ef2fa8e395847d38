"""The peer: plain Celery with a task that does nothing, and nothing durable about it."""

import os
import time

import redis
from celery import Celery

app = Celery("plain", broker=os.environ["REDIS_URL"])
app.conf.update(
    # As in app/celery_app.py, so that only our own work makes the difference.
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    # The same pool: ours replaces a child after 50 jobs, by its default.
    worker_max_tasks_per_child=int(os.environ.get("WORKER_MAX_TASKS_PER_CHILD") or 50),
    worker_send_task_events=True,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    task_default_queue="plain",
)
_client = redis.Redis.from_url(os.environ["REDIS_URL"])


@app.task(name="noop")
def noop() -> None:
    return None


@app.task(name="stamp")
def stamp(sent: float) -> None:
    """How long a message took from the call to here, in seconds."""
    _client.rpush("plain:waits", time.time() - sent)
