"""`python -m tests.integration.scripts.looping`: the worker, with Celery tasks of an owner who did not use jobs."""

import time
from typing import Any

from app.celery_app import celery_app
from worker import __main__ as worker_main


@celery_app.task(name="retry_for_ever", bind=True, max_retries=None)
def retry_for_ever(self: Any, seconds: float) -> None:
    raise self.retry(countdown=seconds)


@celery_app.task(name="nap")
def nap(seconds: float) -> None:
    time.sleep(seconds)


if __name__ == "__main__":
    worker_main.main()
