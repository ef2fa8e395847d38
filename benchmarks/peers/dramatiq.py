"""dramatiq with Redis and nothing durable. Two processes of eight threads, its default on two cores."""

import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks import peers

dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))


@dramatiq.actor
def noop(number: int, sent: float = 0.0) -> None:
    peers.done(number, sent)


def fill(count: int) -> None:
    for number in range(count):
        noop.send(number)


def work() -> None:
    peers.become("dramatiq", "benchmarks.peers.dramatiq", f"--processes={peers.PROCESSES}", "--threads=8")


def send(count: int) -> None:
    for number in range(count):
        noop.send(number, time.time())
        time.sleep(peers.GAP_SECONDS)


peers.main(globals())
