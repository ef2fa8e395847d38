"""The Celery tasks: `run_job`, `run_short_jobs`, and the house-keeping under the names of its files."""

import gc
import signal
from functools import cache
from types import ModuleType
from typing import Any
from uuid import UUID

import redis
import structlog
from celery import Task
from celery.exceptions import Reject
from celery.signals import worker_process_shutdown, worker_ready, worker_shutting_down
from obstore.exceptions import GenericError

from app import elsewhere, logs, ticks
from app.celery_app import celery_app
from app.database import CONNECTION_LOST, Database
from app.jobs import messages
from app.settings import get_settings
from worker import housekeeping, maintenance, short_jobs, shutdown
from worker.request import hand_back_all
from worker.runner import Runner

log = logs.get(__name__)

# How long a child waits for PostgreSQL before it lets a message go.
CLAIM_PATIENCE_SECONDS = 20
# The last is the storage's: see `FileStore.errors`.
AWAY = (*CONNECTION_LOST, *messages.REDIS_ERRORS, GenericError)


_runners: list[Runner] = []


# Made at a child's first task and kept: nothing may be open when the parent forks.
@cache
def _runner(worker: str) -> Runner:
    _runners.append(Runner(get_settings(), worker=worker, may_kill=True))
    return _runners[-1]


@cache
def _database() -> Database:
    return Database(get_settings(), "maintenance", statement_seconds=60)


@cache
def _redis() -> redis.Redis:
    return messages.connect(get_settings())


@celery_app.task(name=messages.RUN_JOB, bind=True, Request="worker.request:JobRequest")
def run_job(self: "Task[..., None]", job_id: str) -> None:
    """Claims the job and runs it. A message for a job that is not due, or that somebody has, ends here."""
    if shutdown.claims_nothing():
        raise Reject("this worker is stopping", requeue=True)
    runner = _runner(self.request.hostname)
    claim = runner.wait_and_claim(UUID(job_id), CLAIM_PATIENCE_SECONDS)
    if claim is not None:
        with shutdown.left_to_the_parent(), structlog.contextvars.bound_contextvars(task_id=self.request.id):
            runner.run(claim)


@celery_app.task(name=messages.RUN_SHORT_JOBS, bind=True, Request="worker.request:JobRequest")
def run_short_jobs(self: "Task[..., None]", queue: str) -> None:
    """A wake-up: runs due short jobs of that queue, if there still are any."""
    if shutdown.claims_nothing():
        raise Reject("this worker is stopping", requeue=True)
    with shutdown.left_to_the_parent(), structlog.contextvars.bound_contextvars(task_id=self.request.id):
        short_jobs.run(_runner(self.request.hostname), _redis(), queue)


def _register(module: ModuleType) -> None:
    """A house-keeping task under its file's name. What it did is its result and one log line; nothing, if nothing.

    `due_at` is there if beat sent it: then it runs only if it gets hold of that tick.
    """
    name = module.__name__.rpartition(".")[2]

    def task(due_at: str | None = None) -> dict[str, Any]:
        try:
            done = housekeeping.run(module, _database(), _redis(), get_settings(), due_at)
        except AWAY as error:
            log.warning("maintenance_failed", task=name, error=str(error).strip())
            raise
        if done:
            log.info("maintenance", task=name, **done)
        return done

    task.__doc__ = module.__doc__
    # The result is kept for a script that asked for the run; beat's messages say that nobody reads theirs, since it
    # stands in the tick's row. The limit is twice the longest slice.
    celery_app.task(name=name, ignore_result=False, throws=AWAY, time_limit=ticks.TIME_LIMIT_SECONDS)(task)


for _module in maintenance.ALL:
    _register(_module)


@worker_process_shutdown.connect
def _child_ends(**_: object) -> None:
    """In a child that ends by itself: what it has counted since its last heartbeat, and what waits for elsewhere."""
    for runner in _runners:
        runner.close()
    elsewhere.flush()


# --- the parent ----------------------------------------------------------------------------------------------------


_pool: Any = None


@worker_ready.connect
def _ready(sender: Any, **_: object) -> None:
    global _pool
    _pool = sender.pool._pool
    # Celery would start itself again: without the clock below, and as a script that does not find `app`.
    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    # Celery collects garbage before it replaces a child, 150 ms for all modules of this process. What is there by now
    # stays anyway: frozen, it is neither looked through again nor copied into each child.
    gc.freeze()


@worker_shutting_down.connect
def _shutting_down(**_: object) -> None:
    """SIGTERM has come. Runs in the signal handler: sets the flag that the children see, and starts the clock."""
    if shutdown.claims_nothing():
        return  # it has come before, and the clock runs
    shutdown.begin()
    shutdown.watch(get_settings(), _pool, hand_back_all)
