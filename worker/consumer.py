"""Celery's consumer, made to tell the truth: a worker that does not consume says so, reconnects, and at last ends."""

import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from queue import Empty
from select import POLLIN, poll
from typing import Any

from celery.bootsteps import RUN  # type: ignore[attr-defined]
from celery.worker import consumer
from celery.worker.state import maybe_shutdown
from redis.exceptions import ConnectionError as RedisGone
from redis.exceptions import ResponseError

from app import alive, logs, workers
from app.settings import get_settings
from worker import shutdown
from worker.health import process_name
from worker.request import hand_back_all

log = logs.get(__name__)

LOOK_SECONDS = 1.0
TOUCH_SECONDS = 5.0
# A worker with a free child asks Redis for a message (BRPOP) and has an answer within a second, if only "none".
SILENT_SECONDS = 10.0
# Without a sign of consuming for so long, although Redis lets us connect, the process is past help.
END_SECONDS = 90.0
# Events (Flower, heartbeats) go out from the event loop: a dead connection must not hold it for long.
EVENTS_TIMEOUT_SECONDS = 2.0
FAREWELL_SECONDS = 1.0
# Events go out together. Celery sends them at every turn of its loop, with two jobs at a time two to a message: half of
# what the parent does.
FLUSH_SECONDS = 0.5
MOST_EVENTS = 500
REFUSED_SECONDS = 5.0


class Consumer(consumer.Consumer):
    """Takes the place of Celery's by the setting `worker_consumer`."""

    connection: Any
    connection_errors: Any
    channel_errors: Any
    task_consumer: Any
    event_dispatcher: Any

    _answered = 0.0  # when Redis last answered BRPOP, or we were too busy to ask
    _touch_at = 0.0
    _broken = False
    _flushing = False  # events wait for their timer
    _signs = 0  # grows while we consume, and while Redis is away, which must never end a worker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._left: set[str] = set()  # messages of a lost connection, to be given back by the next
        super().__init__(*args, **kwargs)

    def start(self) -> None:
        # After the first children are forked. Later ones don't inherit the thread.
        threading.Thread(target=self._end_when_stuck, name="stuck", daemon=True).start()
        super().start()

    # --- the connection ---

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's own waits longer from try to try, up to 32 s: so long would Redis be back and nobody at work."""
        tries = 0

        def failed(error: Exception, interval: float) -> None:
            nonlocal tries
            self._signs += 1
            if tries % 20 == 0:
                log.warning("redis_away", broker=conn.as_uri(), error=str(error), tries=tries + 1)
            tries += 1

        conn.ensure_connection(failed, None, 1, 1, 1, callback=maybe_shutdown)
        if tries:
            log.info("redis_back", tries=tries)
        self.first_connection_attempt = False
        return conn

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Any:
        conn: Any = self.app.connection_for_write(url=url, heartbeat=heartbeat)
        limits = {"socket_timeout": EVENTS_TIMEOUT_SECONDS, "socket_connect_timeout": EVENTS_TIMEOUT_SECONDS}
        conn.transport_options.update(limits)
        # Celery sends its heartbeat "with retries": without end, in the event loop, for as long as Redis is away.
        conn.ensure = lambda _, publish, **__: publish
        return self.ensure_connected(conn)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery's own gives no reason, and explains a setting that `app/celery_app.py` has decided."""
        # Or Redis is there and refuses: its memory is full, or it became a read-only replica.
        refused = isinstance(exc, self.channel_errors)
        log.warning("redis_refuses" if refused else "redis_lost", error=str(exc))
        unacknowledged = [channel.qos for channel in self._channels()]
        for channel in self._channels():
            channel.qos.forget_jobs()
            # There is a good-bye on each, one command after the other, and Redis may hear none of them: only messages
            # are given back, with little patience.
            channel._disconnect_pools()
            channel._in_poll = None
            channel.__dict__.pop("client", None)
            channel.socket_timeout = channel.socket_connect_timeout = FAREWELL_SECONDS
        with suppress(Exception):
            self.connection.collect()
        # What could not be given back now would lie in `unacked` until the visibility timeout, and then come.
        self._left.update(tag for qos in unacknowledged for tag in qos._delivered)
        if refused:
            self._signs += 1
            time.sleep(REFUSED_SECONDS)

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        if not self._flushing:
            self._flushing = True
            self.timer.call_after(FLUSH_SECONDS, self._flush_events)

    def _flush_events(self) -> None:
        self._flushing = False
        super()._flush_events()  # type: ignore[misc]

    def stop(self) -> None:
        with suppress(*self.connection_errors, *self.channel_errors):
            self._flush_events()
            if self.task_consumer:
                self._client().zrem(workers.KEY, self._member())
        super().stop()

    # --- messages ---

    def register_with_event_loop(self, hub: Any) -> None:
        """At the start, and again after each lost connection: a new channel, and no timers left."""
        super().register_with_event_loop(hub)
        self._flushing = False
        if self.event_dispatcher:
            self.event_dispatcher.buffer_limit = MOST_EVENTS
        channel = self.task_consumer.channel
        brpop_read = channel.handlers["BRPOP"]
        within_prefetch, acknowledge, reject = channel.qos.can_consume, channel.qos.ack, channel.qos.reject

        def read() -> None:
            try:
                brpop_read()
            except Empty:
                pass
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # noqa: BLE001
                # No JSON, no envelope, a body that is not base64. It is out of Redis by now; left to Celery, the error
                # would end the worker.
                log.error("malformed_message", error=type(error).__name__)
            self._consuming()

        def can_consume() -> bool:
            # A new channel knows nothing of messages that came by the old one and are being worked on.
            return bool(not self._busy() and within_prefetch())

        def ack(delivery_tag: str) -> None:
            # Celery logs a failure and goes on with this connection, with one message less at a time.
            if self._broken:
                raise RedisGone("an earlier message could not be acknowledged")
            try:
                acknowledge(delivery_tag)
            except self.connection_errors:
                self._broken = True
                raise

        def give_back(delivery_tag: str, requeue: bool = False) -> None:
            try:
                reject(delivery_tag, requeue=requeue)
            except self.connection_errors:
                self._broken = True  # as above
                raise

        for tag in self._left:
            channel.qos.restore_by_tag(tag)
        self._left.clear()
        self._broken = False
        channel.handlers["BRPOP"] = read
        channel.qos.ack = ack
        channel.qos.reject = give_back
        channel.qos.can_consume = can_consume
        self._answered = time.monotonic()
        if not self.restart_count:
            self._touch()
        self.timer.call_repeatedly(LOOK_SECONDS, self._look)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        handle = super().create_task_handler(*args, **kwargs)

        def handle_any(message: Any) -> None:
            try:
                handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # noqa: BLE001
                # Such as a header that is missing. Celery would end with it, give the message back on its way out, and
                # meet it again at its next start, for ever.
                self._drop(message, error)

        return handle_any

    # Celery logs these with the message's content, and lets a database of results know.
    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._drop(message, TypeError())

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._drop(message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._drop(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._drop(message, exc)

    def _drop(self, message: Any, error: Exception) -> None:
        task = message.headers.get("task") if isinstance(message.headers, dict) else None
        log.error("malformed_message", error=type(error).__name__, task=str(task)[:100], bytes=len(message.body or b""))
        message.reject_log_error(logging.getLogger(__name__), self.connection_errors)

    # --- the truth ---

    def _look(self) -> None:
        """In the event loop: notes that we consume, or does something about it."""
        if self.blueprint.state != RUN:
            return
        now = time.monotonic()
        channel = self.task_consumer.channel
        if self._broken:
            raise RedisGone("a message could not be acknowledged")
        if self._busy():
            self._consuming()  # nobody asks; a busy worker is not a dead one
        elif now - self._answered > SILENT_SECONDS and not _readable(channel):  # it is not we who slept
            # The connection looks well and is dead, or Celery has forgotten to ask. Left alone, both last for minutes.
            raise RedisGone(f"no answer for {SILENT_SECONDS:.0f} s")

    def _consuming(self) -> None:
        self._answered = time.monotonic()
        self._signs += 1
        if self._answered >= self._touch_at:
            self._touch_at = self._answered + TOUCH_SECONDS
            alive.touch(process_name())
            with suppress(ResponseError):  # its memory is full: no reason to consume nothing
                self._client().eval(workers.SIGN, 1, workers.KEY, self._member())

    def _client(self) -> Any:
        # Not `channel.client`: BRPOP may be waiting on its one connection, and would get this command's answer.
        return self.task_consumer.channel._create_client()

    def _member(self) -> str:
        return workers.member(self.hostname, get_settings().worker_queues)

    @staticmethod
    def _touch() -> None:
        try:
            alive.touch(process_name())
        except OSError as error:  # which would be taken for Redis's
            log.error("no_sign_of_life", error=str(error))

    def _busy(self) -> bool:
        """Whether every child has a message, be it one that came by an earlier connection."""
        return len(self.pool._pool._cache) >= int(self.pool.num_processes)

    def _channels(self) -> list[Any]:
        """Of all connections that the event loop uses."""
        events = self.event_dispatcher and self.event_dispatcher.connection
        return [
            channel
            for connection in (self.connection, events)
            if connection
            for channel in connection.transport.channels
        ]

    def _end_when_stuck(self) -> None:
        """A thread: ends this process, so that whoever supervises it starts a new one.

        Counts its own rounds and not the clock: a machine that slept has not been stuck.
        """
        quiet, seen = 0.0, -1
        while quiet < END_SECONDS:
            time.sleep(LOOK_SECONDS)
            # A worker that is stopping has a clock of its own.
            quiet = 0 if self._signs != seen or shutdown.claims_nothing() else quiet + LOOK_SECONDS
            seen = self._signs
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        # Whoever reads our log may be what we are stuck on.
        threading.Timer(15, os._exit, (1,)).start()
        log.critical("stuck", seconds=END_SECONDS, stack="".join(traceback.format_stack(main)))
        shutdown.end("ends_itself", self.pool._pool, hand_back_all, exit_code=1)


def _readable(channel: Any) -> bool:
    sock = getattr(channel.client.connection, "_sock", None)
    if sock is None:
        return False
    poller = poll()
    poller.register(sock, POLLIN)
    return bool(poller.poll(0))
