"""Workers' signs of life, for whoever looks: one sorted set in Redis, by its own clock. Nothing is decided by it."""

from typing import Any, NamedTuple

KEY = "jobstack:workers"
# So long is one shown that gives no sign any more.
SHOWN_SECONDS = 600
# A consumer whose last sign is older is none.
ALIVE_SECONDS = 30
SIGN = f"""
local now = tonumber(redis.call('time')[1])
redis.call('zadd', KEYS[1], now, ARGV[1])
redis.call('zremrangebyscore', KEYS[1], '-inf', now - {SHOWN_SECONDS})
redis.call('expire', KEYS[1], {SHOWN_SECONDS})
"""
LOOK = "return {redis.call('time')[1], redis.call('zrange', KEYS[1], 0, -1, 'withscores')}"


class Sign(NamedTuple):
    """A worker's last one."""

    queues: tuple[str, ...]
    seconds_ago: int


def member(name: str, queues: tuple[str, ...]) -> str:
    return f"{name} {','.join(queues)}"


def signs(answer: Any) -> dict[str, Sign]:
    """Of LOOK's answer: each worker's, by its name."""
    now, pairs = answer
    found = {}
    for who, at in zip(pairs[::2], pairs[1::2], strict=True):
        name, _, queues = who.decode().partition(" ")
        found[name] = Sign(tuple(queues.split(",")), max(0, int(now) - int(float(at))))
    return found
