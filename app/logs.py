"""One log format for every process: JSON lines in containers, colours on a terminal."""

import logging
import logging.config
import sys
from typing import Any, TextIO

import structlog

from app.settings import get_settings


def _without_color_message(logger: object, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """uvicorn says each thing twice, the second time in colours."""
    event.pop("color_message", None)
    return event


_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _without_color_message,
]


def configure(stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's loggers through one pipe, to stdout unless another stream is given.

    Not to stderr: platforms such as Railway colour every line there as an error.
    """
    stream = stream or sys.stdout
    settings = get_settings()
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())
    renderer: list[Any] = (
        [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
        if as_json
        # Without the values of variables, which the default shows: payloads and headers are not for a log.
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *_SHARED],
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


def get(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
