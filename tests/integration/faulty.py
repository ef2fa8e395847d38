"""`python -m tests.integration.faulty`: the worker `odd`, of which SIGUSR2 makes what FAULT says.

It is less patient with itself."""

import os
import signal
import time
from typing import Any

from kombu.asynchronous import get_event_loop
from kombu.transport import redis

from app.celery_app import celery_app
from tests.integration import odd
from worker import consumer


def stuck() -> None:
    time.sleep(1000)


def forgets_to_ask() -> None:
    """As after reconnects of earlier versions: nobody asks Redis for the next message."""
    hub: Any = get_event_loop()
    for callback in [callback for callback in hub.on_tick if callback.__module__ == "kombu.transport.redis"]:
        hub.on_tick.remove(callback)


def never_asks() -> None:
    vars(redis)["Channel"]._brpop_start = lambda *_: None


@celery_app.task(name="greedy", throws=())
def greedy() -> None:
    raise MemoryError


def main() -> None:
    consumer.END_SECONDS = 30
    fault = {"stuck": stuck, "forgets to ask": forgets_to_ask, "never asks": never_asks}[os.environ["FAULT"]]

    def strike(*_: Any) -> None:
        fault()

    signal.signal(signal.SIGUSR2, strike)
    odd.main()


if __name__ == "__main__":
    main()
