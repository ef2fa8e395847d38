"""`python -m worker.inline`: API and jobs in one process, with neither Redis nor a worker. For laptops and tests.

Jobs run in a few threads, through the same claim, heartbeat and fence. What threads can't do: no hard time limit, no
forced end for a handler that never looks at its cancel, and no survival of a handler that crashes the process.
"""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

from fastapi import FastAPI

from app import logs
from app.api.__main__ import serve
from app.api.app import create_app
from app.database import CONNECTION_LOST, Database
from app.queues import JOB_QUEUES
from app.settings import Settings, SettingsError, get_settings
from worker import shutdown
from worker.maintenance import cleanup_old_files, database_maintenance
from worker.maintenance.cleanup_orphaned_jobs import count_rescued, rescue
from worker.runner import Runner

log = logs.get(__name__)

LOOK_SECONDS = 0.2
RESCUE_SECONDS = 10
CLEAN_UP_SECONDS = 24 * 3600


def create_inline_app(settings: Settings | None = None) -> FastAPI:
    """The API with the runner's threads inside its lifespan."""
    settings = settings or get_settings()
    if settings.jobs_execution != "inline":
        raise SettingsError("jobstack: worker.inline needs JOBS_EXECUTION=inline")
    app = create_app(settings)
    serve_api = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with serve_api(app) as state:
            runner = Runner(settings, worker="inline", may_kill=False)
            threads = _start(runner)
            try:
                yield state
            finally:
                # Nobody waits for long jobs at a laptop: they are handed back at their next checkpoint.
                shutdown.begin(spent=settings.shutdown_grace_seconds / 2)
                end = time.monotonic() + settings.shutdown_grace_seconds / 2
                for thread in threads:
                    thread.join(max(0.1, end - time.monotonic()))
                runner.close()

    app.router.lifespan_context = lifespan
    return app


def _start(runner: Runner) -> list[threading.Thread]:
    shutdown.reset()
    threads = [
        threading.Thread(target=_work, args=(runner,), name=f"job-{number}", daemon=True)
        for number in range(runner.settings.worker_concurrency)
    ]
    threads.append(threading.Thread(target=_keep_house, args=(runner,), name="house-keeping", daemon=True))
    for thread in threads:
        thread.start()
    return threads


def _work(runner: Runner) -> None:
    """One job after the other, until the process stops."""
    while not shutdown.claims_nothing():
        try:
            claim = runner.claim_next(list(JOB_QUEUES))
            if claim is not None:
                runner.run(claim)
                continue
        except CONNECTION_LOST as error:
            log.warning("claim_failed", error=str(error).strip())
            time.sleep(1)
        time.sleep(LOOK_SECONDS)


def _keep_house(runner: Runner) -> None:
    """What a single process needs of it: rescue of jobs that an earlier process left behind, and once a day, as at each
    start, the clean-ups that do without Redis."""
    clean_up_at = time.monotonic()
    with closing(Database(runner.settings, "maintenance", statement_seconds=60)) as database:
        while not shutdown.claims_nothing():
            try:
                count_rescued(rescue(database, runner.settings, published=False), database)
                if time.monotonic() >= clean_up_at:
                    clean_up_at += CLEAN_UP_SECONDS
                    for task in (database_maintenance, cleanup_old_files):
                        if done := task.run(database, None, runner.settings):
                            log.info("maintenance", task=task.__name__.rpartition(".")[2], **done)
            except CONNECTION_LOST as error:
                log.warning("maintenance_failed", error=str(error).strip())
            except Exception:  # a clean-up that fails, on a full disk for example, must not end rescue
                log.exception("maintenance_failed")
            # Short sleeps, so that the process ends at once when it is told to.
            end = time.monotonic() + RESCUE_SECONDS
            while time.monotonic() < end and not shutdown.claims_nothing():
                time.sleep(LOOK_SECONDS)


def __getattr__(name: str) -> Any:
    """`worker.inline:app`, made when uvicorn asks for it."""
    if name == "app":
        return create_inline_app()
    raise AttributeError(name)


if __name__ == "__main__":
    serve(create_inline_app)
