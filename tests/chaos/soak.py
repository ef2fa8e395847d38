"""A bad night in small: one fault a minute, drawn from a seed, under load that never stops."""

import os
import random
import time
from collections.abc import Callable

from tests.chaos import invariants
from tests.chaos.chaos import Chaos
from tests.chaos.registry import SCENARIOS, Scenario
from tests.chaos.report import Result

RATE = 10
LONG_EVERY = 30
WARM_SECONDS = 60
OURS = ("api", "worker", "worker-maintenance", "beat", "redis")


def minutes() -> float:
    return float(os.environ.get("MINUTES") or 30)


def run(chaos: Chaos, say: Callable[[str], None]) -> Result:
    """Draws faults for MINUTES, then checks everything at once, and that nothing grew."""
    seed = int(os.environ.get("SEED") or random.randrange(2**31))
    say(f"SEED={seed} MINUTES={minutes():g}")
    rng, faults = random.Random(seed), [found for found in SCENARIOS.values() if found.soak]
    began = time.monotonic()
    chaos.begin("soak", seed)
    try:
        # Attempts enough for a job that is hit by one fault after the other.
        chaos.load.start(RATE, long_every=LONG_EVERY, max_attempts=10)
        time.sleep(WARM_SECONDS)
        first = measure(chaos)
        while (left := began + minutes() * 60 - time.monotonic()) > 60:
            fault, minute = rng.choice(faults), time.monotonic()
            say(f"{left / 60:4.1f} min left: {fault.name}")
            fault.body(chaos)
            chaos.heal()
            time.sleep(max(0.0, minute + 60 - time.monotonic()))
        time.sleep(WARM_SECONDS)
        last = measure(chaos)
        chaos.fault_over()
        chaos.end(180)
        for name, before in first.items():
            chaos.measured[name] = f"{before:g} -> {last[name]:g}"
            chaos.expect(last[name] <= allowed(name, before), f"{name} grew from {before:g} to {last[name]:g}")
        scenario = Scenario("soak", lambda _: None, (), None, False, False, RATE, True, None)
        return invariants.check(chaos, scenario, time.monotonic() - began)
    finally:
        chaos.load.close()
        chaos.probe.stop()


def measure(chaos: Chaos) -> dict[str, float]:
    """What must not grow: memory of each service, connections, keys."""
    found: dict[str, float] = {}
    for service in OURS:
        found[f"{service} MB"] = round(sum(container.memory() for container in chaos.all(service)) / 1e6)
    [row] = chaos.sql("SELECT count(*) FROM pg_stat_activity WHERE starts_with(application_name, 'jobstack-')")
    found["PostgreSQL connections"] = row["count"]
    found["Redis connections"] = chaos.redis.info("clients")["connected_clients"]
    found["Redis keys"] = chaos.redis.dbsize()
    found["Redis data MB"] = round(chaos.redis.info("memory")["used_memory"] / 1e6, 1)
    return found


def allowed(name: str, before: float) -> float:
    """Children are replaced now and then, and a reconnecting process has two connections for a moment."""
    return before * 1.3 + (40 if name.endswith("MB") else 10)
