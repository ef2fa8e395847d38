"""Kombu's channel to Redis, with two round trips less for each job.

Celery writes every message that a worker holds into `unacked`, so that it comes back some time after the worker died.
For a job that is a second set of books: which jobs wait, and that their worker is dead, PostgreSQL knows better and
sooner. Other tasks, of the house-keeping or a team's own, have no row, and are written down as ever.
"""

import io
import json
from contextlib import suppress
from typing import Any

from kombu.transport import redis, virtual

from app import logs
from app.jobs.messages import REDIS_ERRORS, RUN_JOB, RUN_SHORT_JOBS

log = logs.get(__name__)


class QoS(redis.QoS):
    channel: Any
    _delivered: Any  # what this worker holds, by its tag

    def append(self, message: Any, delivery_tag: str) -> None:
        if _of_a_job(message):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self._in_no_book(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue or not self._in_no_book(delivery_tag):
            super().reject(delivery_tag, requeue=requeue)
        else:
            virtual.QoS.ack(self, delivery_tag)

    def _in_no_book(self, delivery_tag: str) -> bool:
        """Also a message of a lost connection, which was given back or forgotten."""
        message = self._delivered.get(delivery_tag)
        return message is None or _of_a_job(message)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        message: Any = self._delivered.get(tag)
        if not _of_a_job(message):
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
            return
        # Not atomic, as it is with `unacked`: one copy too many does no harm, and one too few is repaired.
        with suppress(*REDIS_ERRORS), self.channel.conn_or_acquire(client) as connection:
            push = connection.lpush if leftmost else connection.rpush
            push(message.delivery_info["routing_key"], json.dumps(message._raw))

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # At each deploy kombu would say on stderr, and not in JSON, what it gives back.
        said = io.StringIO()
        super().restore_unacked_once(stderr=said)
        if text := said.getvalue().strip():
            log.info("messages_given_back", said=text)

    def forget_jobs(self) -> None:
        """The connection is lost: nothing needs to be given back by it."""
        for tag in [tag for tag, message in self._delivered.items() if _of_a_job(message)]:
            del self._delivered[tag]


def _of_a_job(message: Any) -> bool:
    headers = getattr(message, "headers", None)
    return isinstance(headers, dict) and headers.get("task") in (RUN_JOB, RUN_SHORT_JOBS)


class Channel(redis.Channel):
    pool: Any
    QoS = QoS
    _made: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        # Kombu makes a new one for every command, a tenth of the parent's time.
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[misc]
        if self._made is None or self._made.connection_pool is not self.pool:
            self._made = super()._create_client()  # type: ignore[misc]
        return self._made
