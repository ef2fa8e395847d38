"""`purge_celery_queue.py`, `purge_celery_duplicates.py`, `rebuild_queue.py`."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from psycopg import Connection
from psycopg.rows import DictRow

from app.jobs import messages
from app.queues import MAINTENANCE
from app.settings import Settings
from tests.integration.conftest import Jobs, is_idle
from tests.integration.scripts.conftest import Ran
from tests.integration.test_dispatch import waiting
from tests.servers import Redis
from tests.waiting import until

Script = Callable[..., Ran]
OVER = {"status": "succeeded", "finished_at": "now()", "result": "{}"}


def jobs_in(redis: Redis) -> list[Any]:
    """Those with a message of their own; beside them may lie a wake-up for short jobs."""
    return [job_id for job_id in waiting(redis) if job_id]


def test_a_purge_says_what_comes_back(script: Script, jobs: Jobs, redis: Redis, foreign: object) -> None:
    queued = [jobs.start() for _ in range(20)]
    jobs.send(jobs.insert(**OVER))
    other = jobs.start(queue="low_priority", priority="low")
    for priority in ("", "\x06\x163", "\x06\x169"):
        redis.client.lpush(f"default{priority}", messages.envelope("nap", "default", uuid4().hex, []))
    ran = script("purge_celery_queue", "default", text=True)
    assert ran.code == 2  # nobody can be asked
    # Said before anything is gone.
    assert "Comes back: 20 jobs" in ran.out
    assert "3 nap. Maintenance comes again with its next tick; a task of your own is lost." in ran.out
    assert "24 messages will be deleted from default. 3 nap will not come back." in ran.err
    ran = script("purge_celery_queue", "default", "--dry-run")
    assert (ran.code, ran.json["would_purge"]) == (1, {"default": 24})
    assert redis.length("default") == 22
    ran = script("purge_celery_queue", "default", "--yes")
    assert ran.code == 0
    assert ran.json["purged"] == {"default": 24}
    assert (ran.json["comes_back"], ran.json["not_needed"], ran.json["lost"]) == (20, 1, {"nap": 3})
    assert not redis.client.exists("default", "default\x06\x163", "default\x06\x169")
    assert not redis.client.keys("jobstack:purged:*")
    assert waiting(redis, "low_priority") == [other]
    assert script("rebuild_queue", "--dry-run").json["would_repair"]["default"] == 20
    ran = script("rebuild_queue", "default")
    assert (ran.code, ran.json["repaired"]) == (0, 20)
    assert set(jobs_in(redis)) == set(queued)
    # Empty is fine too.
    assert script("purge_celery_queue", MAINTENANCE, "--yes").code == 0


def test_what_is_purged_comes_back_by_itself(
    script: Script, jobs: Jobs, redis: Redis, start: Callable[..., Any]
) -> None:
    job_id = jobs.start()
    text = script("purge_celery_queue", "--yes", text=True).out
    assert "Comes back: 1 job" in text
    assert "within about 15 s" in text
    for name in ("worker", "worker-maintenance", "beat"):
        start(name)
    assert jobs.finished(job_id)["status"] == "succeeded"


def test_500_duplicates_leave_the_oldest(script: Script, jobs: Jobs, redis: Redis, foreign: object) -> None:
    many = [jobs.start() for _ in range(10)]
    for _ in range(49):
        jobs.send(*many)
    copy: Any = redis.client.lindex("default", -1)
    redis.client.lpush("default", *[copy] * 10)  # the oldest, replayed byte for byte
    finished, gone = jobs.insert(**OVER), uuid4()
    jobs.send(finished)
    redis.client.lpush("default", messages.envelope("run_job", "default", f"{gone}:1", [str(gone)]), "not JSON")
    oldest: list[bytes] = redis.client.lrange("default", -10, -1)  # type: ignore[assignment]
    ran = script("purge_celery_duplicates", "default", "--dry-run")
    assert (ran.code, ran.json["would_remove"]) == (1, {"default": {"duplicates": 500, "finished": 2, "wake_ups": 0}})
    assert redis.length("default") == 513
    ran = script("purge_celery_duplicates", "--yes")
    assert (ran.code, ran.json["removed"]) == (0, 502)
    assert redis.client.lrange("default", 1, -1) == oldest
    left: Any = redis.client.lindex("default", 0)
    assert left == b"not JSON"  # not ours to judge
    assert script("purge_celery_duplicates", "--yes").json["removed"] == 0


def test_what_only_shares_an_id_is_no_copy(script: Script, db: object, redis: Redis) -> None:
    for args, headers in ((["x"], {}), (["y"], {}), (["x"], {"retries": 1}), (["x"], {"eta": "2100-01-01T00:00:00"})):
        redis.client.lpush("default", messages.envelope("report", "default", "nightly", args, **headers))
    redis.client.lpush("default", messages.envelope("mail", "default", "nightly", ["x"]))
    before: list[bytes] = redis.client.lrange("default", 0, -1)  # type: ignore[assignment]
    # Sent again: all but the delivery tag is the same.
    redis.client.lpush("default", messages.envelope("report", "default", "nightly", ["y"]))
    ran = script("purge_celery_duplicates", "default", "--yes")
    assert ran.json["found"] == {"default": {"duplicates": 1, "finished": 0, "wake_ups": 0}}
    assert redis.client.lrange("default", 0, -1) == before


def test_no_job_is_lost_while_workers_run(script: Script, jobs: Jobs, redis: Redis, start: Callable[..., Any]) -> None:
    many = [jobs.start() for _ in range(200)]
    for _ in range(4):
        jobs.send(*many)
    start("worker", WORKER_MAX_TASKS_PER_CHILD=1000)
    for _ in range(3):
        assert script("purge_celery_duplicates", "--yes").code == 0
    for job_id in many:
        assert jobs.finished(job_id)["attempt"] == 1
    until(lambda: redis.length("default") == 0, "copies are dropped")


def test_rebuilding_after_redis_lost_everything(
    script: Script, db: Connection[DictRow], jobs: Jobs, redis: Redis, foreign: dict[bytes, bytes]
) -> None:
    published = [jobs.start() for _ in range(30)]
    new = [jobs.insert() for _ in range(5)]
    redis.client.delete("default")
    ran = script("rebuild_queue", "--dry-run")
    assert (ran.code, ran.json["would_repair"]["default"], ran.json["would_publish"]["default"]) == (1, 30, 5)
    assert redis.length("default") == 0
    ran = script("rebuild_queue", QUEUE_WINDOW="33")
    assert (ran.code, ran.json["published"], ran.json["repaired"]) == (0, 3, 30)
    assert len(jobs_in(redis)) == 33
    script("rebuild_queue")
    assert set(jobs_in(redis)) == {*published, *new}
    assert len(jobs_in(redis)) == 35
    assert script("rebuild_queue", "--dry-run").code == 0


def test_short_jobs_need_no_message_of_their_own(
    script: Script, jobs: Jobs, redis: Redis, settings: Settings, start: Callable[..., Any]
) -> None:
    def wake_up() -> None:
        redis.client.delete(messages.wake_key("default"))
        redis.client.eval(*messages.wake_up("default", settings))  # type: ignore[arg-type]

    def state() -> tuple[str, int]:
        ran = script("task_manager", "status", short[0])
        return ran.json["state"], ran.code

    short = [jobs.insert(short=True, run_at="2020-01-01") for _ in range(3)]
    for _ in range(4):
        wake_up()
    assert state() == ("waits for its group", 1)  # nobody consumes
    # Wake-ups are no copies of a job's message; one of them does.
    ran = script("purge_celery_duplicates", "default", "--yes")
    assert ran.json["found"] == {"default": {"duplicates": 0, "finished": 0, "wake_ups": 3}}
    assert redis.length("default") == 1
    assert drift(script)["level"] == "ok"
    ran = script("rebuild_queue", "--dry-run")
    assert (ran.code, ran.json["would_repair"]["default"], ran.json["would_publish"]["default"]) == (0, 0, 0)
    ran = script("purge_celery_queue", "default", "--yes")
    assert (ran.json["comes_back"], ran.json["wake_ups"], ran.json["lost"]) == (0, 1, {})
    # Redis lost the message, and not the key that says there is one.
    redis.client.set(messages.wake_key("default"), 1)
    assert "3 short jobs of default wait, and nothing wakes a worker up" in drift(script)["message"]
    assert script("rebuild_queue", "--dry-run").code == 1
    ran = script("rebuild_queue")
    assert (ran.code, ran.json["woken"], ran.json["published"], ran.json["repaired"]) == (0, ["default"], 0, 0)
    start("worker")
    for job_id in short:
        assert jobs.finished(job_id)["status"] == "succeeded"
    until(is_idle, "the worker looks for no more of them")
    again = jobs.insert(short=True)
    assert script("task_manager", "status", again).json["state"] == "waits for its group"


def drift(script: Script) -> dict[str, str]:
    [found] = [one for one in script("doctor").json["findings"] if one["check"] == "drift"]
    return dict(found)


def test_an_unknown_queue_is_one_sentence(script: Script, db: object) -> None:
    for name in ("purge_celery_queue", "purge_celery_duplicates", "rebuild_queue"):
        ran = script(name, "defualt", text=True)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "'defualt'" in ran.err
