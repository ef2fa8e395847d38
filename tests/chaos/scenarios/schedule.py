"""Beat and the worker that keeps the house."""

import time

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario
from tests.waiting import until

# What beat and API may pile up for a maintenance worker that is not there.
MOST_WAITING = 110


@scenario(9, bound=15, soak=True)
def kill_beat(chaos: Chaos) -> None:
    """kill -9 of beat, away for some ticks: retries wait that long and no longer."""
    beat = chaos.one("beat")
    mark = chaos.tick_mark()
    beat.kill()
    time.sleep(8)
    beat.start()
    chaos.fault_over()
    chaos.ticked(mark, at_least=2)


@scenario(9, ci=True, rate=5)
def three_beats(chaos: Chaos) -> None:
    """Three beats, one of them killed: each tick is sent once and started once, none is left out."""
    chaos.stack.compose("up", "--detach", "--no-deps", "--no-build", "--no-recreate", "--scale", "beat=3", "beat")
    mark = chaos.tick_mark()
    try:
        chaos.ticked(mark, at_least=4)
        one = chaos.one("beat")
        one.kill()
        chaos.ticked(chaos.tick_mark(), at_least=4)
    finally:
        chaos.stack.compose("up", "--detach", "--no-deps", "--no-build", "--no-recreate", "--scale", "beat=1", "beat")


@scenario(6, 9, bound=45, soak=True)
def maintenance_dead(chaos: Chaos) -> None:
    """Nobody consumes `maintenance` while everything asks for it: what piles up is bounded; then all runs again."""
    worker = chaos.one("worker-maintenance")
    worker.kill()
    # A row that only dispatch can send: from now on the API leaves every job of these queues to it, and says so.
    for priority, queue in (("high", "high_priority"), ("default", "default"), ("low", "low_priority")):
        chaos.insert("flaky", {"failures": 0}, priority=priority, queue=queue)
    lengths = []
    # The API asks five times a second: an hour would be 18,000 messages, half a minute is more than the bound.
    end = time.monotonic() + 28
    while time.monotonic() < end:
        lengths.append(chaos.redis.llen("maintenance"))
        time.sleep(0.5)
    chaos.measured["longest maintenance"] = max(lengths)
    chaos.expect(max(lengths) <= MOST_WAITING, f"maintenance grew to {max(lengths)}")
    worker.start()
    chaos.fault_over()
    until(lambda: chaos.redis.llen("maintenance") < 5, "maintenance is worked off", seconds=60)
