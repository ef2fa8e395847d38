"""Redis restarts, forgets, stands still, is full, and throws everybody out."""

import time

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario


@scenario(1, 2, bound=15, soak=True)
def redis_restart(chaos: Chaos) -> None:
    """Redis restarts with its data."""
    chaos.one("redis").restart()
    chaos.redis_answers()


@scenario(1, 2, bound=15, soak=True)
def redis_restart_empty(chaos: Chaos) -> None:
    """Redis dies and comes back with nothing."""
    redis = chaos.one("redis")
    chaos.queue_up()
    redis.run("sh", "-c", "rm -rf /data/appendonlydir")
    redis.kill()
    redis.start()
    chaos.redis_answers()
    chaos.fault_over()
    chaos.killed = 0


@scenario(1, 2, 6, bound=15, ci=True, soak=True)
def redis_flushall(chaos: Chaos) -> None:
    """Redis loses everything in the middle of the load."""
    chaos.queue_up()
    chaos.redis.flushall()
    chaos.killed = 0


@scenario(1, 11, bound=30, rate=10, ready="degraded", soak=True)
def redis_stop(chaos: Chaos) -> None:
    """Redis is away for a minute: jobs are accepted all the time, and run when it is back."""
    redis = chaos.one("redis")
    redis.stop()
    time.sleep(60)
    redis.start()
    chaos.redis_answers()


@scenario(1, 11, bound=30, ci=True, ready="degraded", soak=True)
def redis_freeze(chaos: Chaos) -> None:
    """Redis stands still for half a minute: connections stay open and nothing answers."""
    with chaos.during(chaos.one("redis").frozen()):
        time.sleep(30)


@scenario(1, 6, bound=20, soak=True)
def redis_full(chaos: Chaos) -> None:
    """Redis refuses to write, since its memory is full."""
    before = chaos.redis.config_get("maxmemory")["maxmemory"]
    chaos.redis.config_set("maxmemory", "1mb")
    try:
        time.sleep(15)
    finally:
        chaos.redis.config_set("maxmemory", before)


@scenario(1, 2, bound=30, soak=True)
def redis_throws_out(chaos: Chaos) -> None:
    """CLIENT KILL of all connections, every 2 s."""
    for _ in range(8):
        chaos.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(2)
