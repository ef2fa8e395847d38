"""Which errors are worth another try, and when."""

import errno
import json

import httpx
import psycopg
import pytest
import redis

from worker import errors
from worker.errors import PermanentError, SoftTimeLimitExceeded, TransientError


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://h")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code, request=request))


@pytest.mark.parametrize(
    "error",
    [
        TransientError("x"),
        SoftTimeLimitExceeded("x"),
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.ENOSPC, "no space left"),
        MemoryError(),
        httpx.ConnectError("x"),
        httpx.ReadTimeout("x"),
        status(429),
        status(503),
        psycopg.OperationalError("x"),
        redis.ConnectionError("x"),
    ],
    ids=repr,
)
def test_it_may_pass(error: BaseException) -> None:
    assert errors.is_transient(error)
    assert errors.retry_delay(error, 1) is not None


@pytest.mark.parametrize(
    "error",
    [
        PermanentError("x"),
        ValueError("x"),
        KeyError("x"),
        FileNotFoundError("x"),
        PermissionError("x"),
        status(404),
        psycopg.DataError("x"),
        SystemExit(1),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_it_will_stay(error: BaseException) -> None:
    assert not errors.is_transient(error)
    assert errors.retry_delay(error, 1) is None


@pytest.mark.parametrize(("attempt", "longest"), [(1, 2), (2, 4), (3, 8), (9, 512), (10, 600), (25, 600)])
def test_the_wait_doubles_up_to_ten_minutes_and_half_of_it_is_chance(attempt: int, longest: float) -> None:
    delays = {errors.retry_delay(TransientError("x"), attempt) for _ in range(200)}
    assert all(delay is not None and longest / 2 <= delay <= longest for delay in delays)
    assert len(delays) > 100


def test_the_other_side_may_ask_for_a_longer_wait() -> None:
    assert errors.retry_delay(TransientError("x", retry_after=90), 1) == 90
    assert errors.retry_delay(TransientError("x", retry_after=9000), 1) == 600


def test_an_error_is_shown_in_what_postgresql_can_store() -> None:
    shown = errors.describe(ValueError("a\x00b\ud800c" + "x" * 5000))
    assert shown["type"] == "ValueError"
    assert shown["message"].startswith("a\ufffdb?c")
    assert len(shown["message"]) == errors.LONGEST_MESSAGE
    json.dumps(shown).encode()
    assert errors.describe(KeyError())["message"] == "KeyError"
