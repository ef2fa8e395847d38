"""What callers do to the API, and what it does with wrong settings."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

from tests.chaos.chaos import Chaos
from tests.chaos.load import Entry
from tests.chaos.registry import scenario


@scenario(8, ci=True, rate=0)
def cancel_race(chaos: Chaos) -> None:
    """A thousand jobs are cancelled at every moment of their life: none succeeds after a cancel was acknowledged."""
    rng = random.Random(chaos.load.prefix)

    def one(number: int) -> tuple[Entry, int, str]:
        payload = {"seconds": rng.choice((0, 0.02, 0.1, 0.5)), "steps": 2}
        entry = chaos.load.create("sleep", payload, ends="any")
        time.sleep(rng.choice((0, 0, 0.01, 0.03, 0.1, 0.3)))
        answer = chaos.load.cancel(entry.job_id)
        return entry, answer.status_code, answer.json().get("status", "")

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(1000)))
    chaos.end(60)
    ends = {str(row["id"]): row["status"] for row in chaos.sql("SELECT id, status FROM jobs")}
    tally: dict[str, int] = {}
    for entry, code, said in answers:
        end = ends[str(entry.job_id)]
        tally[f"{code} {said} {end}"] = tally.get(f"{code} {said} {end}", 0) + 1
        if code == 202:
            chaos.expect(end == "cancelled", f"{entry.key}: the cancel was acknowledged, and it {end}")
        else:
            chaos.expect((code, end) == (409, "succeeded"), f"{entry.key}: {code}, and it {end}")
    chaos.measured["answers"] = json.dumps(tally)


@scenario(1, ci=True, rate=0)
def one_key(chaos: Chaos) -> None:
    """A hundred requests with one key at once: one job, a hundred equal answers."""
    for _ in range(5):
        entry = chaos.load.create("flaky", {"failures": 0})
        fresh = Entry(f"{entry.key}-again", entry.kind, entry.payload, {})
        chaos.load.entries.append(fresh)
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(chaos.load.repeat, [fresh] * 100))
        codes = sorted(answer.status_code for answer in answers)
        ids = {answer.json().get("id") for answer in answers}
        chaos.expect(codes == [200] * 99 + [202], f"answers: {codes}")
        chaos.expect(len(ids) == 1, f"{len(ids)} jobs for one key")
        fresh.status, fresh.job_id = 202, ids.pop()


WRONG = {
    "worker": {"JOB_HEARTBEAT_SECONDS": "10"},
    "worker-maintenance": {"WORKER_QUEUES": "maintenence"},
    "api": {"VISIBILITY_TIMEOUT": "60"},
    "beat": {"JOB_SOFT_TIME_LIMIT": "4000"},
}


@scenario(12, ci=True, rate=0)
def wrong_settings(chaos: Chaos) -> None:
    """No process starts on settings that break a promise; each says which one is wrong."""
    for service, wrong in WRONG.items():
        [(name, value)] = wrong.items()
        code, said = chaos.try_start(service, **wrong)
        chaos.expect(code not in (0, 124), f"{service} started with {name}={value}")
        chaos.expect(name in said, f"{service} does not name {name}: {said[-300:]}")
