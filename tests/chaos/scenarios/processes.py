"""Processes die, are stopped, and stand still."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario

LEASE_SECONDS = 30
BLOCKED = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND application_name = 'jobstack-worker'
"""
# Process 1 is the init; its only child is our process. Without it the container ends, and its restart policy acts.
KILL_MAIN = ("sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")


@scenario(4, bound=10, ci=True, soak=True, reruns=True)
def kill_child(chaos: Chaos) -> None:
    """kill -9 of a child in mid-job: its job runs again at once, the others' go on."""
    [row, *others] = chaos.running_on(chaos.busiest_worker())
    worker = chaos.worker_of(row["id"])
    chaos.fault_over()
    worker.kill_process(row["pid"])
    chaos.run_again([row], seconds=20)
    for other in others:
        if other["kind"] == "sleep":  # the kinds that fail by themselves may be at their second attempt
            chaos.expect(chaos.job(other["id"])["attempt"] == 1, f"{other['id']} suffered from a neighbour's end")


@scenario(4, bound=45, soak=True, reruns=True)
def kill_worker(chaos: Chaos) -> None:
    """kill -9 of a worker, which its restart policy brings back: all its jobs run again."""
    worker = chaos.busiest_worker()
    victims = chaos.running_on(worker)
    chaos.fault_over()
    chaos.killed += 1
    worker.run(*KILL_MAIN)
    chaos.run_again(victims, seconds=60)


@scenario(4, bound=45, ci=True, soak=True, reruns=True)
def kill_one_of_two(chaos: Chaos) -> None:
    """A worker is gone as in a power cut and stays away: the other one takes all its jobs."""
    worker = chaos.busiest_worker()
    victims = chaos.running_on(worker)
    chaos.fault_over()
    chaos.killed += 1
    worker.kill()
    chaos.run_again(victims, seconds=60)
    worker.start()


@scenario(2, bound=45, rate=5, soak=True, reruns=True)
def pause_worker(chaos: Chaos) -> None:
    """A worker stands still for two leases and wakes up: others have its jobs, and what it writes is refused."""
    # In one step, and longer than the time from the new claim to the awakening: the sleeper wakes up, finds its time
    # over and finishes at once, while the other one is still at it.
    late = [chaos.load.create("sleep", {"seconds": 45, "steps": 1}) for _ in range(3)]
    for entry in late:
        chaos.reaches(entry.job_id, "running")
    worker = chaos.worker_of(late[0].job_id)
    victims = chaos.running_on(worker)
    chaos.fault_over()
    with worker.frozen():
        chaos.run_again(victims, seconds=60)
        time.sleep(max(0.0, chaos.fault_end + 2 * LEASE_SECONDS - chaos.clock()))
    running = {entry.job_id for entry in late if chaos.status(entry.job_id) == "running"}
    chaos.expect(running, "no job was still running when its first worker woke up")


@scenario(10, bound=45, ci=True, rate=10, reruns=True)
def stop_worker(chaos: Chaos) -> None:
    """SIGTERM: what is short ends, what is long is handed back without counting an attempt, and the worker is gone."""
    long = chaos.load.create("sleep", {"seconds": 3600, "steps": 1000}, ends="cancelled")
    chaos.reaches(long.job_id, "running")
    worker = chaos.worker_of(long.job_id)
    short = [row["id"] for row in chaos.running_on(worker) if str(row["id"]) != long.job_id]
    chaos.fault_over()
    began = time.monotonic()
    worker.stop()
    took = time.monotonic() - began
    chaos.measured["SIGTERM to exit, s"] = round(took, 1)
    chaos.expect(took < 60, f"the worker took {took:.0f} s to end")
    chaos.expect(worker.state["ExitCode"] == 0, f"the worker's exit code was {worker.state['ExitCode']}")
    for job_id in short:
        chaos.expect(chaos.moves(job_id)[-1] == "running succeeded", f"{job_id} was not let end: {chaos.moves(job_id)}")
    chaos.reaches(long.job_id, "running")
    chaos.expect(chaos.job(long.job_id)["attempt"] == 1, "handing back counted an attempt")
    worker.start()
    chaos.cancel(long.job_id)


@scenario(1, 11, bound=15, soak=True)
def kill_api(chaos: Chaos) -> None:
    """kill -9 of the API, four times, in the middle of requests: asked again with their keys, each makes one job."""
    for _ in range(4):
        api = chaos.one("api")
        api.kill()
        api.start()
        chaos.answers(chaos.load.look, "the API")
        time.sleep(0.7)


@scenario(1, bound=15, ci=True, soak=True)
def kill_api_before_publishing(chaos: Chaos) -> None:
    """The API dies between COMMIT and publishing, since Redis stands still: dispatch finds the jobs."""
    api = chaos.one("api")
    with chaos.during(chaos.one("redis").frozen()):
        time.sleep(1.5)
        api.kill()
    api.start()


@scenario(1, 10, bound=30, reruns=True)
def rolling(chaos: Chaos) -> None:
    """Every service is replaced under load, one after the other."""
    for service in ("worker", "worker-maintenance", "beat", "api"):
        chaos.stack.compose("up", "--detach", "--no-deps", "--force-recreate", "--no-build", service)
    chaos.fault_over()
    rows = chaos.sql(
        "SELECT idempotency_key, attempt FROM jobs WHERE starts_with(idempotency_key, %(p)s) AND kind = 'sleep' "
        "AND attempt > 1",
        p=chaos.load.prefix,
    )
    chaos.expect(not rows, f"a deploy cost attempts: {rows}")


@scenario(1, 2, bound=60, rate=10, reruns=True)
def power_cut(chaos: Chaos) -> None:
    """Everything is killed at once, both servers as well, and comes back."""
    everything = [container for container in chaos.all() if container.service != "receiver"]
    with ThreadPoolExecutor(len(everything)) as pool:
        list(pool.map(lambda container: container.kill(), everything))
    chaos.killed += 2
    for container in everything:
        container.start()
    chaos.fault_over()


@scenario(3, ci=True, rate=0, reruns=True)
def kill_after_call(chaos: Chaos) -> None:
    """kill -9 after somebody else's API was called and before the job ends: it is not called again."""
    entries = []
    for number in range(3):
        path = f"/taken/{chaos.load.prefix}{number}"
        with chaos.end_held_up("webhook", {"url": f"http://receiver:8080{path}", "body": {}}) as entry:
            chaos.recorded(entry.job_id)
            chaos.worker_of(entry.job_id).kill_process(chaos.job(entry.job_id)["pid"])
            # Else the end would be written all the same: PostgreSQL looks for its client when the statement is over.
            chaos.sql(BLOCKED)
        entries.append(entry)
    for entry in entries:
        chaos.reaches(entry.job_id, "succeeded")
        calls = [call for call in chaos.calls() if call["key"] == entry.job_id]
        chaos.expect(chaos.job(entry.job_id)["attempt"] == 2, f"{entry.key} was not killed in its first attempt")
        chaos.expect(len(calls) == 1, f"double: {entry.key} called {len(calls)} times")
