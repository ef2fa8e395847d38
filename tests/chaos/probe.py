"""Asks the API's two health checks all the time, as a platform would, and remembers what they said."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import httpx

EVERY_SECONDS = 0.5


class Answer(NamedTuple):
    """`status`: ok, degraded, unavailable; None: no answer. `seconds`: how long it took; `at`: when it was asked."""

    path: str
    at: float
    seconds: float
    status: str | None


class Probe:
    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.answers: list[Answer] = []
        self._url, self._clock, self._stop = url, clock, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(path,), daemon=True) for path in ("/health/live", "/health/ready")
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, path: str) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._stop.wait(EVERY_SECONDS):
                at, began = self._clock(), time.monotonic()
                try:
                    status = client.get(path).json()["status"]
                except (httpx.HTTPError, ValueError, KeyError):
                    status = None
                self.answers.append(Answer(path, at, time.monotonic() - began, status))
