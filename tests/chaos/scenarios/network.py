"""A worker loses one server and keeps the other, without a word from anybody."""

import time

from tests.chaos.chaos import Chaos
from tests.chaos.registry import scenario


@scenario(2, 4, bound=45, soak=True)
def cut_off_from_redis(chaos: Chaos) -> None:
    """A worker without Redis ends the jobs that it has; the others' are taken by the other one."""
    worker = chaos.busiest_worker()
    with chaos.during(worker.cut_off("broker")):
        time.sleep(25)


@scenario(2, 4, bound=45, soak=True, reruns=True)
def cut_off_from_postgres(chaos: Chaos) -> None:
    """A worker without PostgreSQL loses its jobs to the other one, and is refused when it is back."""
    worker = chaos.busiest_worker()
    victims = chaos.running_on(worker)
    chaos.fault_over()
    with worker.cut_off("inner"):
        chaos.run_again(victims, seconds=60)
