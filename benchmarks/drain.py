"""Jobs that wait, and workers that come: how many a second until the last is over."""

from benchmarks.contenders import Contender, wait_until_over
from benchmarks.noise import watched
from benchmarks.servers import Bench


def drain(
    bench: Bench, contender: Contender, count: int, *, tasks_per_child: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Jobs a second between the 5th and the 95th of a hundred, so that starts and ends don't count; CPU of everything
    on the machine that belongs to the contender, a job, which is less at the mercy of who else is on it; and the noise.
    """
    bench.reset()
    contender.fill(count)
    bench.db.execute("CHECKPOINT")
    first, last = int(count * 0.05), int(count * 0.95)
    with contender.working(WORKER_MAX_TASKS_PER_CHILD=tasks_per_child):
        before = wait_until_over(contender, first)
        with watched() as noise:
            after = wait_until_over(contender, last)
        wait_until_over(contender, count)
    times = contender.finishes(count)
    rate = (last - first) / (times[last] - times[first])
    return {"jobs/s": rate, "CPU ms/job": noise["cpu_seconds"] / (after - before) * 1000}, noise
