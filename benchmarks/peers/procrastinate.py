"""procrastinate: jobs in PostgreSQL, durable, without Redis. Two processes, one job each at a time, as by default."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import procrastinate

from benchmarks import peers

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=os.environ["DATABASE_URL"]),
    import_paths=["benchmarks.peers.procrastinate"],
)


# By itself it would be named after the module, which is `__main__` for whoever fills the queue.
@app.task(name="noop")
def noop(number: int, sent: float = 0.0) -> None:
    peers.done(number, sent)


@contextmanager
def _emptied() -> Iterator[None]:
    connector = procrastinate.SyncPsycopgConnector(conninfo=os.environ["DATABASE_URL"])
    with app.replace_connector(connector) as sync, sync.open():
        if sync.check_connection():
            connector.execute_query("TRUNCATE procrastinate_jobs CASCADE")
        else:
            sync.schema_manager.apply_schema()
        yield


def fill(count: int) -> None:
    with _emptied():
        noop.batch_defer(*({"number": number} for number in range(count)))


def work() -> None:
    for _ in range(peers.PROCESSES - 1):
        if os.fork() == 0:
            break
    peers.become("procrastinate", "--log-level=warning", "--app=benchmarks.peers.procrastinate.app", "worker")


def send(count: int) -> None:
    with _emptied():
        for number in range(count):
            noop.defer(number=number, sent=time.time())
            time.sleep(peers.GAP_SECONDS)


peers.main(globals())
