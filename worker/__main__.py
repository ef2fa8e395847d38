"""`python -m worker`: a Celery worker for the queues in WORKER_QUEUES. Same process, so SIGTERM reaches Celery."""

from contextlib import suppress

import celery.apps.worker
from billiard.util import get_pdeathsig  # type: ignore[attr-defined]
from kombu.transport.redis import Transport

from app import logs, migrate
from app.celery_app import celery_app
from app.queues import MAINTENANCE
from app.settings import get_settings
from worker import tasks  # noqa: F401  registers the tasks
from worker.channel import Channel
from worker.health import process_name

log = logs.get("worker")


def say(text: str, *_: object) -> None:
    """Instead of Celery's, which prints what it does at a signal: no JSON."""
    log.info(text.strip())


def main() -> None:
    settings = get_settings()
    migrate.wait(settings, process_name())
    concurrency = settings.worker_concurrency
    if MAINTENANCE in settings.worker_queues:
        # Dispatch and rescue must never wait behind a long clean-up.
        concurrency = max(2, concurrency)
    # Ours in the place of Celery's own.
    celery_app.conf.worker_pool = "worker.pool:TaskPool"
    celery_app.conf.worker_consumer = "worker.consumer:Consumer"
    celery_app.Task.Request = "worker.request:TaskRequest"
    Transport.Channel = Channel
    celery.apps.worker.safe_say = say  # type: ignore[attr-defined] # its types know nothing of it
    # Each child asks the kernel to end it with its parent, by way of a parser for C that takes 30 ms to import. Called
    # once before the fork, it is there.
    with suppress(OSError):  # Linux only
        get_pdeathsig()
    celery_app.worker_main(
        [
            # Celery's banner is not JSON; what it says stands in the log.
            "--quiet",
            "worker",
            f"--hostname={process_name()}@%h",
            f"--queues={','.join(settings.worker_queues)}",
            f"--concurrency={concurrency}",
            # Prefork only: threads can neither be stopped at a time limit nor survive a handler's crash.
            "--pool=prefork",
            # Workers need to know nothing of each other: rescue and dispatch go by PostgreSQL.
            "--without-gossip",
            "--without-mingle",
            f"--loglevel={settings.log_level}",
        ]
    )


if __name__ == "__main__":
    main()
