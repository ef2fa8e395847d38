"""The scripts are run as people run them: as processes, against real servers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.jobs import messages
from tests import processes
from tests.processes import ROOT, Process
from tests.servers import Redis, free_port
from tests.waiting import until

# What it takes to say that something cannot be reached, the start of Python included.
# By themselves they wait up to 5 s for a connection, the doctor 12.5 s in all; a busy machine needs as long for Python.
LONGEST_SECONDS = 30


class Ran:
    """How a script ended: `code`, `out`, `err`, and `json` where it was asked for; the seconds it took."""

    def __init__(self, done: "subprocess.CompletedProcess[str]", *, as_json: bool, seconds: float) -> None:
        self.seconds = seconds
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.json: Any = json.loads(done.stdout) if as_json and done.stdout else None

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}{self.err}"


@pytest.fixture
def script(environment: Redis, tmp_path: Path) -> Callable[..., Ran]:
    """script("task_manager", "status", id, **env) -> how it ended. JSON is asked for unless `text=True`."""

    def run(name: str, *arguments: object, text: bool = False, seconds: float = 60, **env: str) -> Ran:
        command = [sys.executable, f"scripts/{name}.py", *map(str, arguments), *([] if text else ["--json"])]
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        ran = Ran(done, as_json=not text, seconds=time.monotonic() - began)
        assert "Traceback" not in ran.err + ran.out, ran
        assert "secret" not in ran.err + ran.out, ran  # every password of the tests
        return ran

    return run


def repeated(look: Callable[[], Ran], fits: Callable[[Ran], object], what: str) -> Ran:
    """The first run that fits, of a script that changes nothing. Workers have a second or two to answer a script, and
    on a busy machine they may take longer."""
    seen: list[Ran] = []

    def is_seen() -> bool:
        seen.append(look())
        return bool(fits(seen[-1]))

    try:
        until(is_seen, what)
    except AssertionError as error:
        raise AssertionError(f"{error}; at last {seen[-1]}") from None
    return seen[-1]


@pytest.fixture
def looping(tmp_path: Path, redis: Redis, db: object) -> Iterator[Callable[..., Process]]:
    """looping(**env) -> a worker for all queues that knows the tasks in looping.py."""
    with ExitStack() as stack:

        def begin(**env: object) -> Process:
            queues = "high_priority,default,low_priority,maintenance"
            folder = tmp_path / f"worker-{free_port()}"
            folder.mkdir()
            module = "tests.integration.scripts.looping"
            return stack.enter_context(processes.running(module, folder, "worker", **{"WORKER_QUEUES": queues, **env}))

        yield begin


@pytest.fixture
def foreign(redis: Redis) -> Iterator[dict[bytes, bytes]]:
    """Somebody else's keys in the same Redis, some with names like ours; at the end they are as they were."""
    client = redis.client
    for number in range(100):
        client.set(f"shop:cart:{number}", "x")
        client.hset(f"other:unacked:{number}", "tag", "[]")
        client.lpush(f"other:default:{number}", "{}")
    client.lpush("other:default", messages.envelope("their_task", "default", "their-id", []))
    client.hset("other:unacked", "tag", json.dumps([{"headers": {"id": "their-id"}}, "", "default"]))
    client.set("other:celery-task-meta-their-id", "{}")
    client.set("celery-task", "x")
    # Named like Celery's results, and none.
    client.set("celery-task-meta-data", "no JSON at all")
    client.set("celery-task-meta-list", "[]")
    client.set("celery-task-meta-theirs", '{"task_id": "another", "status": "SUCCESS"}')
    client.hset("celery-task-meta-hash", "field", "x")
    names: list[bytes] = client.keys("*")  # type: ignore[assignment]
    before = {name: client.dump(name) for name in names}
    yield before  # type: ignore[misc]
    assert {name: client.dump(name) for name in before} == before
    assert not any(client.ttl(name) != -1 for name in before)
