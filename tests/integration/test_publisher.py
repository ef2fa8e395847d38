"""The API's side of publishing: what it knows of the queues between its sends."""

import asyncio
from contextlib import suppress
from uuid import uuid4

from app.jobs import messages
from app.jobs.publisher import ASK_SECONDS, Publisher
from app.queues import MAINTENANCE
from app.settings import Settings
from tests.servers import Redis


def test_what_is_on_its_way_has_taken_its_room(settings: Settings, redis: Redis) -> None:
    """From the decision that a row may be published until the queue's length is known, nobody else gets its place."""

    async def fill() -> None:
        client = messages.connect_async(settings)
        publisher = Publisher(settings.model_copy(update={"queue_window": 1}), client)

        def room() -> list[str]:
            with publisher.room_for(["default", "high_priority"]) as queues:
                return queues

        with publisher.room_for(["default"]) as queues:
            assert queues == ["default"]
            assert room() == ["high_priority"]  # while the row is inserted
            publisher.submit([{"id": uuid4(), "kind": "flaky", "queue": "default"}])
        assert room() == ["high_priority"]
        sending = asyncio.create_task(publisher._flush())
        while not sending.done():
            assert room() == ["high_priority"]
            await asyncio.sleep(0)
        assert room() == ["high_priority"]
        assert redis.client.delete("default") == 1  # a worker took it
        publisher.ask_dispatch()
        await publisher._flush()
        assert room() == ["default", "high_priority"]
        await client.aclose()

    asyncio.run(fill())


def test_a_send_without_an_answer_may_have_arrived(settings: Settings, redis: Redis) -> None:
    async def lose() -> None:
        client = messages.connect_async(settings, seconds=0.1)
        publisher = Publisher(settings.model_copy(update={"queue_window": 1}), client)
        with publisher.room_for(["default"]):
            publisher.submit([{"id": uuid4(), "kind": "flaky", "queue": "default"}])
        redis.client.client_pause(1000, all=False)
        await publisher._flush()
        publisher._away_until = 0  # a second later
        with publisher.room_for(["default", "high_priority"]) as queues:
            assert queues == ["high_priority"]
        redis.client.client_unpause()
        await client.aclose()

    asyncio.run(lose())


def test_room_that_was_not_used_is_there_again(settings: Settings) -> None:
    publisher = Publisher(settings.model_copy(update={"queue_window": 1}), messages.connect_async(settings))
    for _ in range(2):
        with suppress(RuntimeError), publisher.room_for(["default"]) as queues:
            assert queues == ["default"]
            raise RuntimeError("the insert failed")
    with publisher.room_for(["default"] * 2) as queues:
        assert queues == []


def test_the_api_asks_no_more_where_nobody_listens(settings: Settings, redis: Redis) -> None:
    """An hour of requests that leave rows to dispatch: five a second."""

    async def ask() -> None:
        client = messages.connect_async(settings)
        publisher = Publisher(settings, client)
        for _ in range(300):
            publisher._asked_at -= 2 * ASK_SECONDS
            publisher.ask_dispatch()
            await publisher._flush()
        await client.aclose()

    asyncio.run(ask())
    assert redis.length(MAINTENANCE) == messages.MOST_MAINTENANCE
    redis.client.delete(MAINTENANCE)
    asyncio.run(ask())
    assert redis.length(MAINTENANCE) == messages.MOST_MAINTENANCE
