"""How a stack gets into the state that a page is about, quickly and with the product's own settings.

Each takes a night with a healthy stack and yields the variables of its page's commands, `$ID` mostly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.runbooks.night import Night, State
from tests.waiting import until

STATES: dict[str, State] = {}
Body = Callable[[Night], Iterator[dict[str, str]]]


def state(page: str) -> Callable[[Body], Body]:
    def add(body: Body) -> Body:
        STATES[page] = contextmanager(body)
        return body

    return add


@state("beat-silent")
def beat_silent(night: Night) -> Iterator[dict[str, str]]:
    """Somebody stopped it."""
    night.stack.compose("stop", "beat")
    until(lambda: "beat not running" in night.try_script("debug_beat_service.py"), "it shows")
    yield {}


@state("same-job-again")
def same_job_again(night: Night) -> Iterator[dict[str, str]]:
    """A job fails each time with what looks as if it would go by."""
    job = night.stack.create("flaky", {"failures": 24}, max_attempts=25)
    until(lambda: night.stack.job(job)["attempt"] >= 2, "it was tried again")
    yield {"ID": job}


@state("queue-grows")
def queue_grows(night: Night) -> Iterator[dict[str, str]]:
    """More comes than two children can do: one long job each, and others behind them for ten minutes."""
    night.busy()
    night.batch(30, {"seconds": 1})
    night.change("UPDATE jobs SET run_at = run_at - interval '10 minutes' WHERE status = 'queued'")
    yield {}


@state("jobs-stuck-running")
def jobs_stuck_running(night: Night) -> Iterator[dict[str, str]]:
    """A worker died, and who would rescue its job is gone as well."""
    job = night.stack.create("sleep", {"seconds": 3600, "steps": 1000})
    until(lambda: night.stack.job(job)["status"] == "running", "it runs")
    night.stack.compose("kill", "worker-maintenance")
    restarts = night.stack.inspect("worker")["RestartCount"]
    # Process 1 is the init; its only child is the worker's parent. Docker starts the container again.
    night.stack.execute("worker", "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")

    def is_back() -> bool:
        container = night.stack.inspect("worker")
        # Not by State.Running, which is also true while it is to be restarted.
        return bool(container["RestartCount"] > restarts and container["State"]["Status"] == "running")

    until(is_back, "the worker's container runs again")
    night.change("UPDATE jobs SET lease_expires_at = now() - interval '10 minutes' WHERE status = 'running'")
    yield {"ID": job}


RESULTS = """
local text = '{"status": "SUCCESS", "date_done": "2026-01-01T00:00:00+00:00", "result": "' .. string.rep('x', 50000)
for i = ARGV[1] * 450, ARGV[1] * 450 + 449 do
    local id = string.format('%08d-0000-4000-8000-000000000000', i)
    redis.call('SET', 'celery-task-meta-' .. id, text .. '", "task_id": "' .. id .. '"}')
end
"""


@state("redis-memory-grows")
def redis_memory_grows(night: Night) -> Iterator[dict[str, str]]:
    """A task of somebody's own leaves large results that never expire."""
    for slice_ in range(10):  # a script's effects are in memory twice until they are on disk
        night.redis("eval", RESULTS, "0", str(slice_))
    yield {}


@state("worker-idle")
def worker_idle(night: Night) -> Iterator[dict[str, str]]:
    """A setting took the queue away from the worker."""
    night.set_up("WORKER_QUEUES=high_priority")
    night.stack.compose("up", "--detach", "--no-deps", "--wait", "worker")
    night.batch(20, {"seconds": 0.1})
    yield {}


TAKE_ALL = """
import os, pathlib, time, psycopg
taken, refused = [], 0
while refused < 20:
    try:
        taken.append(psycopg.connect(os.environ["DATABASE_URL"], application_name="monthly-report", autocommit=True))
        refused = 0
    except psycopg.OperationalError:
        refused += 1
        time.sleep(0.1)
pathlib.Path("/dev/shm/taken").touch()
while taken[0].execute("SELECT 1"):
    time.sleep(1)
"""


@state("database-connections-gone")
def database_connections_gone(night: Night) -> Iterator[dict[str, str]]:
    """Another program has taken all that were left."""
    night.stack.compose("exec", "--detach", "worker", "python", "-c", TAKE_ALL)
    # Not by looking whether one is left: the look would be what leaves one.
    until(lambda: night.stack.execute("worker", "ls", "/dev/shm"), "all are taken")  # noqa: S108 - the container's
    yield {}


@state("deploy-stuck")
def deploy_stuck(night: Night) -> Iterator[dict[str, str]]:
    """A new setting breaks a rule, and a long transaction would hold up a migration."""
    night.set_up("JOB_SOFT_TIME_LIMIT=7200")
    slow = "SELECT count(*), pg_sleep(3600) FROM jobs"
    psql = ("psql", "--username=jobstack", "--command", slow)
    night.stack.compose("exec", "--detach", "--env", "PGAPPNAME=monthly-report", "postgres", *psql)
    yield {}


@state("disk-full")
def disk_full(night: Night) -> Iterator[dict[str, str]]:
    """Old files fill the disk: 64 MB here."""
    for number in range(5):
        night.stack.upload(f"recording-{number}.wav", bytes(13_250_000), "audio/wav")
    night.change("UPDATE files SET created_at = created_at - interval '40 days'")
    yield {}


@state("purge-gone-wrong")
def purge_gone_wrong(night: Night) -> Iterator[dict[str, str]]:
    """The wrong queue was purged, while the house-keeping that would mend it is away."""
    night.busy()
    night.batch(30, {"seconds": 0.1}, priority="low")
    until(lambda: night.redis("llen", "low_priority").strip() == "30", "their messages wait")
    night.stack.compose("stop", "beat")
    until(lambda: "beat not running" in night.try_script("debug_beat_service.py"), "it shows")
    night.stack.execute("worker", "python", "scripts/purge_celery_queue.py", "low_priority", "--yes")
    night.change("UPDATE jobs SET published_at = published_at - interval '5 minutes' WHERE status = 'queued'")
    yield {}
