"""`python -m worker.health`: exit code 0 while the worker of this container or folder consumes messages."""

import os
from typing import Any

from app import alive

TOUCH_SECONDS = 5
LIMIT_SECONDS = 30


def process_name() -> str:
    """One worker a container; natively two share a folder, so the house-keeper's file has another name."""
    return "worker-maintenance" if os.environ.get("WORKER_QUEUES", "").strip() == "maintenance" else "worker"


def install(celery_app: Any) -> None:
    """Lets the worker touch its file from the event loop that fetches messages, while its connection stands."""
    from celery import bootsteps

    class SignOfLife(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **_: object) -> None:
            self._timer: Any = None

        def start(self, parent: Any) -> None:
            alive.touch(process_name())
            self._timer = parent.timer.call_repeatedly(TOUCH_SECONDS, self._touch, (parent,))

        def stop(self, parent: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()

        @staticmethod
        def _touch(parent: Any) -> None:
            if parent.connection is not None and parent.connection.connected:
                alive.touch(process_name())

    celery_app.steps["consumer"].add(SignOfLife)


if __name__ == "__main__":
    alive.check(process_name(), LIMIT_SECONDS)
