"""Requests at a steady rate, and the journal of what was asked and answered."""

import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import until

# Longer than the API may take (5 s), so that a slow answer is measured and not cut off.
PATIENCE_SECONDS = 20
CLEAR = range(200, 500)
# Jobs at the start of each load that are long enough to be hit by a fault.
LONG = 4


@dataclass
class Entry:
    """One request: its key, what was asked, and the first answer. `at`: epoch seconds by the database's clock."""

    key: str
    kind: str
    payload: dict[str, Any]
    fields: dict[str, Any]
    ends: str = "succeeded"
    at: float = 0
    seconds: float = 0
    status: int | None = None
    error: str | None = None
    job_id: str | None = None
    # How often it was sent; more than once where no answer, or a 5xx, left open whether the job exists.
    sent: int = 0

    @property
    def accepted(self) -> bool:
        return self.status in (200, 202)


def usual(rng: random.Random, key: str) -> tuple[str, dict[str, Any]]:
    """One job of the mix: mostly short ones, some that take a while, some that need a second attempt."""
    match rng.choices(("noop", "text", "sleep", "flaky", "webhook"), (50, 20, 12, 10, 8))[0]:
        case "noop":
            return "flaky", {"failures": 0}
        case "text":
            return "text_report", {"text": "the cat and the hat " * 50}
        case "sleep":
            return "sleep", {"seconds": round(rng.uniform(0.2, 2), 2), "steps": 5}
        case "flaky":
            return "flaky", {"failures": 1, "error": "transient"}
        case _:
            return "webhook", {"url": f"http://receiver:8080/{key}", "body": {"key": key}}


def long_one(rng: random.Random, _: str) -> tuple[str, dict[str, Any]]:
    return "sleep", {"seconds": round(rng.uniform(15, 18), 1), "steps": 30}


class Load:
    """All requests of one scenario. Keys begin with `prefix`, by which the jobs are found in PostgreSQL."""

    def __init__(self, url: str, prefix: str, journal: Path, clock: Callable[[], float], seed: int) -> None:
        self.prefix, self.entries = prefix, list[Entry]()
        self._journal, self._clock, self._rng = journal.open("a"), clock, random.Random(seed)
        self._http = httpx.Client(
            base_url=url, timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_connections=200, keepalive_expiry=2)
        )
        self._pool = ThreadPoolExecutor(200)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._open: list[Future[Entry]] = []

    # ---- one request -----------------------------------------------------------------------------------------------

    def create(self, kind: str, payload: dict[str, Any], *, ends: str = "succeeded", **fields: Any) -> Entry:
        """Sends one request, which must be accepted. `ends`: the status that its job should end with."""
        entry = self._send(self._entry(kind, payload, ends, fields))
        assert entry.accepted, entry
        return entry

    def create_later(self, kind: str, payload: dict[str, Any], *, ends: str = "succeeded", **fields: Any) -> None:
        """In a thread, and whatever the answer is."""
        self._open.append(self._pool.submit(self._send, self._entry(kind, payload, ends, fields)))

    def repeat(self, entry: Entry) -> httpx.Response:
        """The same request once more, past the journal."""
        body = {"kind": entry.kind, "payload": entry.payload, **entry.fields}
        return self._http.post("/api/jobs", json=body, headers={"Idempotency-Key": entry.key})

    def adopt(self, kind: str, payload: dict[str, Any], job_id: str, *, ends: str = "succeeded") -> str:
        """Puts a job into the journal that comes by another way, and returns the key that it must have."""
        entry = self._entry(kind, payload, ends, {})
        entry.status, entry.job_id, entry.at = 202, job_id, self._clock()
        return entry.key

    def forget(self, job_ids: set[str]) -> None:
        """These jobs were deleted on purpose."""
        self.entries = [entry for entry in self.entries if entry.job_id not in job_ids]

    def cancel(self, job_id: str | None) -> httpx.Response:
        return self._http.post(f"/api/jobs/{job_id}/cancel")

    def look(self) -> httpx.Response:
        return self._http.get("/health/live")

    def _entry(self, kind: str, payload: dict[str, Any], ends: str, fields: dict[str, Any]) -> Entry:
        with self._lock:
            entry = Entry(f"{self.prefix}{len(self.entries):05}", kind, payload, fields, ends)
            self.entries.append(entry)
        return entry

    def _send(self, entry: Entry) -> Entry:
        entry.at, entry.sent, began = self._clock(), entry.sent + 1, time.monotonic()
        try:
            answer = self.repeat(entry)
        except httpx.HTTPError as error:
            entry.status, entry.error = None, repr(error)
        else:
            entry.status, entry.error = answer.status_code, None if answer.is_success else answer.text[:300]
            if entry.accepted:
                entry.job_id = answer.json()["id"]
        # Of several tries the slowest counts: none may hang.
        entry.seconds = max(entry.seconds, time.monotonic() - began)
        with self._lock:
            self._journal.write(json.dumps(asdict(entry)) + "\n")
        return entry

    # ---- many ------------------------------------------------------------------------------------------------------

    def start(self, rate: float, *, long_every: int = 1_000_000, **fields: Any) -> None:
        """`rate` requests a second until `stop`, in threads: one that hangs holds up none behind it.

        The first LONG of them are long jobs, and each `long_every`-th from then on.
        """
        self._thread = threading.Thread(target=self._run, args=(rate, long_every, fields), daemon=True)
        self._thread.start()

    def _run(self, rate: float, long_every: int, fields: dict[str, Any]) -> None:
        began, number = time.monotonic(), 0
        while not self._stop.wait(max(0.0, began + number / rate - time.monotonic())):
            number += 1
            make = long_one if number <= LONG or number % long_every == 0 else usual
            kind, payload = make(self._rng, f"{self.prefix}{number}")
            self.create_later(kind, payload, **fields)

    def stop(self) -> None:
        """Ends the load and waits for all answers."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for future in self._open:
            future.result()

    def settle(self, seconds: float = 60) -> None:
        """Asks again, with the same key, wherever it was left open whether the job exists."""
        for entry in self.entries:
            if entry.status not in CLEAR:
                with suppress(AssertionError):  # it stays unclear, which the invariants report
                    until(lambda e=entry: self._send(e).status in CLEAR, "a clear answer", seconds=seconds)  # type: ignore[misc]

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._http.close()
        self._journal.close()
