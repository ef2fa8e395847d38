"""taskiq with a Redis list and nothing durable: a job that is under way when its worker dies is lost."""

import asyncio
import os
import time

from taskiq_redis import ListQueueBroker

from benchmarks import peers

broker = ListQueueBroker(os.environ["REDIS_URL"])


# By itself it would be named after the module, which is `__main__` for whoever fills the queue.
@broker.task(task_name="noop")
async def noop(number: int, sent: float = 0.0) -> None:
    peers.done(number, sent)


def fill(count: int) -> None:
    asyncio.run(_send(count, stamped=False))


def work() -> None:
    peers.become(
        "taskiq", "worker", "benchmarks.peers.taskiq:broker", f"--workers={peers.PROCESSES}", "--log-level=WARNING"
    )


def send(count: int) -> None:
    asyncio.run(_send(count, stamped=True))


async def _send(count: int, *, stamped: bool) -> None:
    await broker.startup()
    for number in range(count):
        await noop.kiq(number, time.time() if stamped else 0.0)
        if stamped:
            await asyncio.sleep(peers.GAP_SECONDS)
    await broker.shutdown()


peers.main(globals())
