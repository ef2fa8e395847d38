"""The one Celery configuration: workers, beat, Flower and scripts all import it. docs/celery.md has the evidence."""

import logging
import socket
from typing import Any

from celery import Celery
from celery.signals import setup_logging
from celery.utils.log import get_multiprocessing_logger
from kombu import Queue
from redis import RedisError

from app import logs
from app.jobs.kinds import all_kinds
from app.jobs.messages import RUN_JOB
from app.queues import ALL_QUEUES, MAINTENANCE, QUEUE_OF_PRIORITY
from app.settings import Settings, get_settings, split_redis_url


def visibility_timeout(settings: Settings) -> int:
    """Seconds after which Redis gives an unacknowledged message to another worker.

    Above the longest hard limit, so that it strikes no task that runs. It is not what rescues jobs: leases are, and
    `worker/channel.py` leaves their messages out of it.
    """
    longest = max((kind.limits(settings)[1] for kind in all_kinds().values()), default=0)
    return max(settings.visibility_seconds, longest + 300)


def _keepalive() -> dict[int, int]:
    """A peer that is gone without a word is noticed after half a minute, by default after two hours."""
    wanted = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
    # macOS does not have them all.
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings, each with its reason."""
    broker, broker_tls = split_redis_url(settings.broker_url)
    backend, backend_tls = split_redis_url(settings.result_backend_url)
    return {
        # --- broker ---
        "broker_url": broker,
        "broker_use_ssl": broker_tls or None,
        "broker_connection_retry_on_startup": True,  # None by default, with a warning
        "broker_connection_max_retries": None,  # the default gives up after 100 tries: a worker that ends at night
        "broker_connection_timeout": 4,
        # False ends the worker at an error that Redis answers with: its memory is full, it is a replica now.
        "broker_channel_error_retry": True,
        # Only these are read from this dictionary, and a misspelt one is silently ignored.
        "broker_transport_options": {
            "visibility_timeout": visibility_timeout(settings),
            # None by default, which is forever: a frozen Redis then freezes whoever talks to it.
            "socket_timeout": 10,
            "socket_connect_timeout": 4,
            "socket_keepalive": True,
            "socket_keepalive_options": _keepalive(),
            "health_check_interval": 25,
            # Urgent work first, strictly; the default takes turns.
            "queue_order_strategy": "app.queues:UrgentFirst",
        },
        # --- results: only maintenance tasks store one, jobs have their row ---
        "result_backend": backend,
        "redis_backend_use_ssl": backend_tls or None,
        "result_expires": settings.result_expires,  # this sets the TTL; the transport option of that name does not
        "task_ignore_result": True,
        "redis_socket_timeout": 5,  # 120 by default
        "redis_socket_connect_timeout": 4,
        "redis_backend_health_check_interval": 25,
        "result_backend_transport_options": {"retry_policy": {"max_retries": 2, "interval_start": 0}},
        # --- messages ---
        "task_serializer": "json",
        "accept_content": ["json"],  # never pickle: whoever can write to Redis could run code
        "task_queues": [Queue(name) for name in ALL_QUEUES],
        "task_default_queue": MAINTENANCE,
        # For whoever sends one by Celery; our own messages name their queue. Jobs must not get among the house-keeping.
        "task_routes": {RUN_JOB: {"queue": QUEUE_OF_PRIORITY["default"]}},
        "task_create_missing_queues": False,  # a misspelt queue is an error and not a queue that nobody reads
        # --- workers: PostgreSQL's lease decides who runs a job, so some general advice does not apply ---
        "task_acks_late": True,  # the message goes when the job is over
        "task_reject_on_worker_lost": True,  # a child died: its message comes again at once
        "worker_prefetch_multiplier": 1,  # a reserved message is a job that nobody else can start
        # True would kill every running job at each blip of Redis; a second copy is refused by the claim anyway.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # True fetches less after a lost connection until all old jobs are over; `worker/consumer.py` counts them.
        "worker_enable_prefetch_count_reduction": False,
        "worker_concurrency": settings.worker_concurrency,  # never the host's CPU count
        "worker_max_tasks_per_child": settings.worker_max_tasks_per_child,
        "worker_hijack_root_logger": False,
        "worker_send_task_events": True,
        "worker_enable_remote_control": True,
        "timezone": settings.schedule_timezone,
        "enable_utc": True,
    }


@setup_logging.connect
def _setup_logging(**_: object) -> None:
    """Connected, so that Celery leaves logging alone."""
    logs.configure()
    # It says when a child was killed, and by itself prints past the one pipe.
    if logger := get_multiprocessing_logger():
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    for name in ("celery.worker.consumer.consumer", "celery.worker.request"):
        logging.getLogger(name).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A lost connection to Redis is foreseen: a line will do."""
    if record.exc_info and isinstance(record.exc_info[1], RedisError | OSError):
        record.exc_info = None
    return True


# No `include`: Flower and beat would import it too, and their images have neither the tasks nor their libraries.
celery_app = Celery("jobstack")
# A function: read when Celery first needs it, so that importing this module needs no environment.
celery_app.add_defaults(lambda: configuration(get_settings()))
