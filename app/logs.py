"""One log format for every process: JSON lines in containers, colours on a terminal."""

import json
import logging
import logging.config
import os
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from app import elsewhere
from app.settings import get_settings


def _without_color_message(logger: object, name: str, event: EventDict) -> EventDict:
    """uvicorn says each thing twice, the second time in colours."""
    event.pop("color_message", None)
    return event


_encode = json.JSONEncoder(default=repr, allow_nan=False).encode


def _as_json(logger: object, name: str, event: EventDict) -> str:
    try:
        return _encode(event)
    except (TypeError, ValueError):  # a key that is no text, NaN: no reason to end the work that a line speaks of
        return _encode({key: value if isinstance(value, str) else repr(value) for key, value in event.items()})


class _Lines:
    """Each line by one system call: none within another, of whatever thread or child, and no lock to be forked with."""

    def __init__(self, stream: TextIO) -> None:
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):
            # Closed, or no file: what a test runner put in the place of stdout. No reason to end whoever logs.
            self._fd = 1

    def info(self, line: str) -> None:
        left = f"{line}\n".encode(errors="backslashreplace")
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            pass  # as the standard library has it: a log that nobody reads any more stops nobody's work

    debug = warning = error = critical = info


_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure(stream: TextIO | None = None) -> None:
    """Send our lines and those of the standard library's loggers, in one format, to stdout or another stream.

    Not to stderr: platforms such as Railway colour every line there as an error. Our own don't go through `logging`,
    which would take half of the time that a short job takes. To be called once a process.
    """
    stream = stream or sys.stdout
    settings = get_settings()
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())
    renderer: list[Any] = (
        [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            _as_json,
        ]
        if as_json
        # Without the values of variables, which the default shows: payloads and headers are not for a log.
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    if settings.sentry_dsn:
        renderer.insert(0, elsewhere.to_sentry)
    structlog.configure(
        processors=[*_SHARED, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=lambda *_: _Lines(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                *_SHARED,
                structlog.stdlib.ExtraAdder(),
                _without_color_message,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "celery.redirected"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    # Each of these says per job or per request what we say ourselves, better.
    for name in ("uvicorn.access", "celery.app.trace", "celery.worker.strategy", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for problem in settings.unverified_connections():
        get("tls").warning("tls_not_verified", problem=problem)


def get(name: str) -> FilteringBoundLogger:
    """A logger of ours: `log.info("event", key=value)`. A line costs some 20 us, one below LOG_LEVEL nothing."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger
