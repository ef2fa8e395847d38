"""What fills Redis, by kind of key, and its clean-up: results without a time to live, stale ones, what the dead left.

Keys of anybody else in the same Redis are counted and left alone. The hourly cleanup_celery_results does most of this.

python scripts/cleanup_redis_manual.py --dry-run
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from app.queues import ALL_QUEUES
from scripts import helper, looks
from scripts.broker import BATCH, RESULT_PREFIX, Broker
from scripts.helper import FINE, FOUND, AsJson, DryRun, Script, Yes, count, size
from scripts.trigger_cleanup_manual import add
from worker.maintenance import cleanup_celery_results

# MEMORY USAGE of every key would take minutes where there are a million: so many of each kind stand for all.
SAMPLE = 200
# Takes seconds: worth a word before the silence.
MANY = 100_000


@dataclass
class Kind:
    """The keys of one kind. `memory` is estimated from a sample; `without_ttl` is not looked at in `other`."""

    keys: int = 0
    without_ttl: int = 0
    sample: list[int] = field(default_factory=list)

    @property
    def memory(self) -> float:
        return self.keys * sum(self.sample) / len(self.sample) if self.sample else 0.0


def main(as_json: AsJson = False, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Exits 0: it is clean now. 1 with --dry-run: there is something to do."""
    script = Script(as_json)
    broker = Broker(script.redis, script.celery, results=script.results)
    if (keys := broker.client.dbsize()) > MANY:
        script.say(f"Looks through {keys:,} keys; Redis serves everybody else meanwhile.")
    kinds, immortal = survey(broker)
    dead = of_the_dead(script, broker)
    show(script, kinds)
    todo = {"results_without_ttl": len(immortal), "unacked_of_jobs_over": len(dead)}
    script.say(
        f"{count(todo['results_without_ttl'], 'result')} without a time to live, "
        f"{count(todo['unacked_of_jobs_over'], 'unacknowledged message')} of jobs that are over."
    )
    if dry_run:
        script.next("the same without --dry-run." if any(todo.values()) else "nothing; what is `other` is not ours.")
        script.done(FOUND if any(todo.values()) else FINE, would_clean=todo, kinds=facts(kinds))
    before = memory(broker)
    if any(todo.values()):
        script.confirm("Stale results will be deleted, the others get a time to live; dead workers' leavings go.", yes)
    done: dict[str, Any] = {}
    while add(done, cleanup_celery_results.run(script.database, script.redis, script.settings)):
        script.say(f"  {done} so far")
    done["unacked"] = broker.drop_held(dead)
    kinds, immortal = survey(broker)
    show(script, kinds)
    said = ", ".join(f"{name} {number}" for name, number in done.items() if number) or "nothing"
    script.say(f"Done: {said}. Memory: {size(before)} before, {size(memory(broker))} now.", "green")
    script.next("if it grows again: docs/housekeeping.md; what is under `other` is not ours.")
    facts_now = {"memory_before": before, "memory_after": memory(broker), "without_ttl": len(immortal)}
    script.done(FINE, done=done, kinds=facts(kinds), **facts_now)


def survey(broker: Broker, *, seconds: float = float("inf")) -> tuple[dict[str, Kind], list[bytes]]:
    """The keys by kind, and the results that never expire; those that it meets in so many seconds. By SCAN, so Redis
    serves everybody else meanwhile."""
    end = time.monotonic() + seconds
    kinds: dict[str, Kind] = defaultdict(Kind)
    immortal: list[bytes] = []
    kind_of = classifier(broker)
    for client in dict.fromkeys((broker.client, broker.results)):
        for keys in scan(client):
            if time.monotonic() > end:
                break
            names = dict(zip(keys, map(kind_of, keys), strict=True))
            # Of a million keys of somebody else nobody needs to know how long they live.
            ours = [key for key in keys if names[key] != "other"]
            for_ever = {key for key, left in zip(ours, ask(client, "TTL", ours), strict=True) if left == -1}
            doubtful = [key for key in for_ever if names[key] == "results"]
            for key, value in zip(doubtful, ask(client, "GET", doubtful), strict=True):
                if cleanup_celery_results.seconds_left(key, value, now=0, result_expires=0) is None:
                    names[key] = "other"
                else:
                    immortal.append(key)
            measured = []
            for key, name in names.items():
                kind = kinds[name]
                kind.keys += 1
                kind.without_ttl += key in for_ever and name != "other"
                if kind.keys <= SAMPLE:
                    measured.append(key)
            for key, used in zip(measured, ask(client, "MEMORY USAGE", measured), strict=True):
                kinds[names[key]].sample.append(used if isinstance(used, int) else 0)
    return dict(kinds), immortal


def ask(client: Any, command: str, keys: list[bytes]) -> list[Any]:
    """An error is an answer: a key may be of another type than its name says."""
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.execute_command(command, key)
    return pipe.execute(raise_on_error=False) if keys else []


def classifier(broker: Broker) -> Any:
    """A function from a key to the kind that it is of, by its name."""
    queues = {key.encode() for queue in ALL_QUEUES for key in broker.lists(queue)}
    unacked = {broker.unacked.encode(), broker.unacked_index.encode(), b"unacked_mutex"}
    results = RESULT_PREFIX.encode()
    celery = re.compile(rb"_kombu\.binding|[0-9a-f-]{36}\.reply\.celery\.pidbox$|celery-taskset-meta-")

    def kind_of(key: bytes) -> str:
        if key in queues:
            return "queues"
        if key in unacked:
            return "unacked"
        if key.startswith(results):
            return "results"
        return "celery" if celery.match(key) else "jobstack" if key.startswith(b"jobstack:") else "other"

    return kind_of


def scan(client: Any) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for key in client.scan_iter(count=1000):
        batch.append(key)
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def of_the_dead(script: Script, broker: Broker) -> list[str]:
    """Tags of messages that nobody acknowledged although their job is over: their worker died before it could."""
    held = {held.tag: held.message.job_id for held in broker.held() if held.message.job_id is not None}
    status = {row["id"]: row["status"] for row in script.sql(looks.STATUSES, {"ids": list(set(held.values()))})}
    return [tag for tag, job_id in held.items() if status.get(job_id, "succeeded") in looks.OVER]


def memory(broker: Broker) -> int:
    return int(broker.client.info("memory")["used_memory"])


def show(script: Script, kinds: dict[str, Kind]) -> None:
    rows = []
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1].memory):
        without_ttl = "?" if name == "other" else f"{kind.without_ttl:,}"
        rows.append(((name, f"{kind.keys:,}", without_ttl, f"~{size(kind.memory)}"), ""))
    script.table(("kind", "keys", "without TTL", "memory"), rows)


def facts(kinds: dict[str, Kind]) -> dict[str, Any]:
    return {
        name: {
            "keys": kind.keys,
            "without_ttl": None if name == "other" else kind.without_ttl,
            "memory": round(kind.memory),
        }
        for name, kind in kinds.items()
    }


if __name__ == "__main__":
    helper.run(main)
