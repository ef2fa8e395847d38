"""How a job can end badly, and which errors are worth another try. Extend `TRANSIENT` when you add a library."""

import random
from typing import Any

import httpx
import obstore.exceptions
import psycopg
import redis


class PermanentError(Exception):
    """The job will not get better by repetition. The message is shown to users: what was wrong, what to do."""


class TransientError(Exception):
    """Worth another try, after `retry_after` seconds if the other side asked for that."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SoftTimeLimitExceeded(Exception):
    """The handler took longer than its kind's soft limit; it may clean up, the hard limit is near."""


# These end a handler but are no errors of it. BaseException, so that a handler's `except Exception` can't swallow them.
class Cancelled(BaseException):
    """A cancel is recorded on the job's row."""


class LeaseLost(BaseException):
    """Somebody else has the job now; nothing that this run does counts any more."""


class HandBack(BaseException):
    """The worker is stopping; another one goes on with the job."""


TRANSIENT: tuple[type[BaseException], ...] = (
    TransientError,
    SoftTimeLimitExceeded,
    ConnectionError,
    TimeoutError,
    OSError,
    MemoryError,
    httpx.TransportError,
    obstore.exceptions.GenericError,
    psycopg.OperationalError,
    redis.RedisError,
)
# Subclasses of those that another try does not help.
PERMANENT: tuple[type[BaseException], ...] = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    httpx.UnsupportedProtocol,
    obstore.exceptions.NotFoundError,
)

FIRST_RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 600.0
LONGEST_MESSAGE = 2000


def is_transient(error: BaseException) -> bool:
    """Connections, time limits, I/O, 429 and 5xx pass; whatever else is a bug or bad input and stays."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, TRANSIENT) and not isinstance(error, PERMANENT)


def retry_delay(error: BaseException, attempt: int) -> float | None:
    """Seconds until the next attempt after attempt number `attempt`; None if there must be none.

    Doubles each time, up to ten minutes, and half of it is chance: a thousand jobs that failed together must not come
    back together.
    """
    if not is_transient(error):
        return None
    asked = error.retry_after if isinstance(error, TransientError) else None
    delay = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (attempt - 1))
    jittered: float = delay * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
    return min(LONGEST_RETRY_SECONDS, max(asked or 0.0, jittered))


def describe(error: BaseException) -> dict[str, Any]:
    """An error as it is stored and shown: {type, message}."""
    return {"type": type(error).__name__, "message": storable(str(error) or type(error).__name__)[:LONGEST_MESSAGE]}


def storable(text: str) -> str:
    """The text without what PostgreSQL can't store: NUL and lone surrogates."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def refused(what: str, error: psycopg.Error) -> PermanentError:
    """For a value that PostgreSQL does not take, now or later."""
    reason = ": ".join(filter(None, (error.diag.message_primary, error.diag.message_detail))) or str(error)
    return PermanentError(f"{what} cannot be stored: {reason}")
