"""Does it work? A run of the health task here, and with --async through Redis and a worker, with the time of each leg.

python scripts/test_celery.py --async
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer

from app.queues import ALL_QUEUES, MAINTENANCE
from scripts import helper
from scripts.broker import Broker
from scripts.helper import FINE, FOUND, AsJson, Script, within
from worker.maintenance import health_check

TASK = "health_check"
PATIENCE_SECONDS = 12.0
# Where no worker answers: one that is busy with its start may come all the same.
NOBODY_SECONDS = 4.0


def main(
    through_broker: Annotated[bool, typer.Option("--async", help="Then through Redis and a worker.")] = False,
    queue: Annotated[str, typer.Option(help=f"Whose worker: {', '.join(ALL_QUEUES)}.")] = MAINTENANCE,
    as_json: AsJson = False,
) -> None:
    """Exits 0: every leg works. 1: a worker does not do its part. 2: PostgreSQL or Redis does not answer."""
    script = Script(as_json)
    [queue] = script.queues([queue])
    legs: dict[str, float] = {}

    def leg(name: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = call()
        legs[name] = (time.monotonic() - began) * 1000
        script.say(f"  {name:<34} {legs[name]:8.1f} ms", "green")
        return result

    script.say(f"{TASK}, in this process:")
    leg("connect to PostgreSQL", lambda: script.database)
    leg("connect to Redis", lambda: script.redis)
    leg("run", lambda: within(10, lambda: health_check.run(script.database, script.redis, script.settings)))
    if not through_broker:
        script.next("test_celery.py --async goes through Redis and a worker.")
        script.done(FINE, milliseconds=legs)

    broker = Broker(script.redis, script.celery, results=script.results)
    before = broker.depths([queue])[queue]
    script.say(f"{TASK}, through {queue}{f' behind {before} messages' if before else ''}:")
    consumers = [worker.name for worker in broker.workers().values() if queue in worker.queues]
    trip = broker.send_and_wait(TASK, queue, seconds=PATIENCE_SECONDS if consumers else NOBODY_SECONDS)
    legs["send"] = trip.sent * 1000
    if trip.taken is not None:
        legs["until a worker took it"] = (trip.taken - trip.sent) * 1000
    if trip.worked:
        legs["run, and its result"] = (trip.passed - (trip.taken or 0)) * 1000
    for name in list(legs)[3:]:
        script.say(f"  {name:<34} {legs[name]:8.1f} ms", "green")
    if trip.worked:
        script.next("nothing: every leg works.")
        script.done(FINE, milliseconds=legs)
    what, hint = trip.why, "make logs SERVICE=worker"
    if trip.taken is None and consumers:
        what = f"{what} within {PATIENCE_SECONDS:g} s; {', '.join(consumers)} consumes {queue} and is busy"
        hint = "doctor.py shows what it does."
    elif trip.taken is None:
        what, hint = f"{what}: no worker that answers consumes {queue}", f"make ps, or start_celery_worker.sh {queue}"
    script.say(f"  {what}", "red")
    script.next(hint)
    script.done(FOUND, milliseconds=legs, message=what, next=hint)


if __name__ == "__main__":
    helper.run(main)
