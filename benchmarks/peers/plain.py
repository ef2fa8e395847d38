"""Plain Celery with a task that does nothing, and nothing durable about it: what there is to be gained and lost."""

import base64
import json
import os
import time

import redis
from celery import Celery

from benchmarks import peers

# As in app/celery_app.py, so that only our own work makes the difference.
SETTINGS = {
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_max_tasks_per_child": peers.TASKS_PER_CHILD,
    "worker_send_task_events": True,
    "worker_hijack_root_logger": False,
    "broker_connection_retry_on_startup": True,
}
app = Celery("plain", broker=os.environ["REDIS_URL"])
app.conf.update(SETTINGS, task_default_queue="plain")


@app.task(name="noop")
def noop(number: int, sent: float = 0.0) -> None:
    peers.done(number, sent)


def fill(count: int) -> None:
    noop.apply_async((0,))
    multiply("plain", [[number] for number in range(count)])


def multiply(queue: str, arguments: list[list[object]]) -> None:
    """Puts the one message of a queue there once for each of these arguments. Sending them one by one would take longer
    than working on them does."""
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        [message] = client.lrange(queue, 0, -1)
        client.delete(queue)
        client.lpush(queue, *_copies(message, arguments))


def _copies(message: bytes, arguments: list[list[object]]) -> list[str]:
    made = []
    for number, args in enumerate(arguments):
        copy = json.loads(message)
        _, *rest = json.loads(base64.b64decode(copy["body"]))
        copy["body"] = base64.b64encode(json.dumps([args, *rest]).encode()).decode()
        # A worker keeps messages apart by their ids and tags.
        copy["headers"].update(id=f"{number:032x}", root_id=f"{number:032x}", argsrepr=repr(tuple(args)))
        copy["properties"].update(correlation_id=f"{number:032x}", delivery_tag=f"{number:x}")
        made.append(json.dumps(copy))
    return made


def work() -> None:
    work_on("benchmarks.peers.plain", "plain")


def work_on(module: str, queue: str) -> None:
    options = [f"--queues={queue}", f"--concurrency={peers.PROCESSES}", "--pool=prefork"]
    peers.become("celery", "--quiet", "-A", module, "worker", *options, "--without-gossip", "--without-mingle")


def send(count: int) -> None:
    for number in range(count):
        noop.delay(number, time.time())
        time.sleep(peers.GAP_SECONDS)


peers.main(globals())
