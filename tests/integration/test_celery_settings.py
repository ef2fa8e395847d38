"""What docs/celery.md says of settings, shown on a real Redis."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Connection, Consumer, Queue

from app.celery_app import configuration, visibility_timeout
from app.settings import Settings
from tests.servers import Redis
from tests.waiting import until

AppMaker = Callable[..., Celery]


@pytest.fixture
def make_app(settings: Settings, redis: Redis) -> AppMaker:
    """make_app(name=value) -> an app with our configuration and these changes."""

    def make(**changes: Any) -> Celery:
        app = Celery("test", set_as_current=False)
        app.conf.update(configuration(settings) | changes)
        return app

    return make


def ttl_of_a_result(app: Celery, redis: Redis) -> int:
    task_id = str(uuid4())
    app.backend.store_result(task_id, {"done": 1}, "SUCCESS")
    found: int = redis.client.ttl(f"celery-task-meta-{task_id}")  # type: ignore[assignment]
    return found


def test_result_expires_sets_the_ttl_of_results(make_app: AppMaker, redis: Redis, settings: Settings) -> None:
    assert settings.result_expires - 5 <= ttl_of_a_result(make_app(), redis) <= settings.result_expires
    assert 95 <= ttl_of_a_result(make_app(result_expires=100), redis) <= 100


def test_the_transport_option_of_that_name_does_not(make_app: AppMaker, redis: Redis, settings: Settings) -> None:
    app = make_app(result_backend_transport_options={"result_expires": 77})
    assert ttl_of_a_result(app, redis) > 77


def test_a_results_time_limits_are_top_level_settings(make_app: AppMaker) -> None:
    limits = {"socket_timeout": 1, "health_check_interval": 9}
    backend: Any = make_app(redis_socket_timeout=6, result_backend_transport_options=limits).backend
    ignored = backend.connparams
    assert ignored["socket_timeout"] == 6
    assert ignored["health_check_interval"] == 25


def test_the_broker_reads_these_options(make_app: AppMaker, settings: Settings) -> None:
    with make_app().connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.visibility_timeout == visibility_timeout(settings)
        assert channel.socket_timeout == 10
        assert channel.socket_connect_timeout == 4
        assert channel.health_check_interval == 25
        assert channel.queue_order_strategy == "app.queues:UrgentFirst"
        sock = channel.client.connection_pool.get_connection()._sock
        for number, value in channel.socket_keepalive_options.items():
            assert sock.getsockopt(socket.IPPROTO_TCP, number) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"result_backend_transport_options": {"visibility_timeout": 5}, "broker_transport_options": {}},
        {"visibility_timeout": 5, "broker_transport_options": {}},
        {"broker_transport_options": {"visibilty_timeout": 5}},
    ],
    ids=["of the result backend", "top level", "misspelt"],
)
def test_elsewhere_a_visibility_timeout_changes_nothing(changes: dict[str, Any], make_app: AppMaker) -> None:
    with make_app(**changes).connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.visibility_timeout == 3600


def test_it_exceeds_every_time_limit(settings: Settings) -> None:
    assert visibility_timeout(settings) >= settings.job_time_limit + 300


def test_a_dead_consumers_message_comes_back_after_the_visibility_timeout_and_not_before(
    make_app: AppMaker, redis: Redis
) -> None:
    app = make_app(broker_transport_options={"visibility_timeout": 2})
    app.send_task("anything", queue="default")
    dead = app.connection_for_read()
    began = time.monotonic()
    _take(dead)
    assert redis.client.hlen("unacked") == 1
    with app.connection_for_read() as living:
        channel: Any = living.default_channel

        def restored() -> bool:
            channel.qos.restore_visible()
            redis.client.delete("unacked_mutex")  # kombu looks only every so often
            return bool(redis.client.llen("default"))

        until(restored, "the message is back")
    assert time.monotonic() - began > 1.5
    [message] = redis.client.lrange("default", 0, -1)  # type: ignore[misc]
    assert json.loads(message)["headers"]["task"] == "anything"
    dead.collect()


def _take(connection: Connection) -> None:
    """Receives a message and does not acknowledge it."""
    taken: list[Any] = []
    with Consumer(connection, [Queue("default")], callbacks=[lambda body, message: taken.append(message)]):
        while not taken:
            connection.drain_events(timeout=5)
        # Leaving the block would give it back.
        channel: Any = connection.default_channel
        channel.qos.restore_at_shutdown = False
