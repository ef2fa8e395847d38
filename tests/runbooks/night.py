"""A clone with its stack, and somebody who types what a page says."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.stack import OURS, ROOT, Stack
from tests.runbooks.pages import Command, unexpected
from tests.waiting import until

# Makes a stack ill, and gives the variables that the page's commands use besides API.
State = Callable[["Night"], AbstractContextManager[dict[str, str]]]


class Night:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(".*", "__pycache__", "chaos-results"))
        for hidden in (".dockerignore", ".env.example"):
            shutil.copy(ROOT / hidden, self.root)
        override = "docker-compose.override.yml"
        shutil.copy(Path(__file__).parent / "compose.override.yml", self.root / override)
        self.stack = Stack(folder, root=self.root, files=(override,))
        # The pages' commands get no options: as everywhere, what they need is in the clone's .env.
        given = folder / f"{self.stack.project}.env"
        self.env = f"COMPOSE_PROJECT_NAME={self.stack.project}\n{given.read_text()}"
        self.env_file = self.root / ".env"
        self.env_file.write_text(self.env)
        given.unlink()
        given.symlink_to(self.env_file)
        # As `make up` leaves it.
        (self.root / ".run").mkdir()
        (self.root / ".run" / "mode").write_text("compose")

    def up(self) -> None:
        self.stack.up(*OURS)

    def down(self) -> None:
        self.stack.down()

    @contextmanager
    def fallen_ill(self, state: State) -> Iterator[dict[str, str]]:
        """Within the block the stack is in that state, and the page is to mend it. If it does not, the stack is made
        anew, so that the next page has its own trouble only."""
        try:
            with state(self) as variables:
                yield {"API": str(self.stack.http.base_url).rstrip("/"), **variables}
            self.clear()
        except BaseException:
            self.env_file.write_text(self.env)
            self.stack.compose("down", "--volumes", "--timeout", "1")
            self.up()
            raise

    def type(self, command: Command, variables: dict[str, str]) -> None:
        """Runs a command of a page in the clone's folder; what it prints must be what the page says."""
        __tracebackhide__ = True  # what was printed is all there is to say
        end = time.monotonic() + command.seconds
        while True:
            done = subprocess.run(
                ["sh", "-c", command.text],
                check=False,
                cwd=self.root,
                env=self.stack.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            wrong = unexpected(command.lines, done.stdout)
            if wrong is None and (done.returncode == 0) != command.may_fail:
                return
            if time.monotonic() > end:
                break
        expected = "\n".join(command.lines)
        why = "the exit code does not fit" if wrong is None else f"not found: {wrong}"
        raise AssertionError(
            f"$ {command.text}\nexit code {done.returncode}; {why}\n"
            f"--- the page says\n{expected}\n--- it printed\n{done.stdout}"
        )

    def is_well(self) -> None:
        """A page ends with a stack that has no problem."""

        def healthy() -> bool:
            lines = map(json.loads, self.stack.compose("ps", "--format", "json").splitlines())
            return all(container["Health"] == "healthy" for container in lines)

        def problems() -> list[Any]:
            text = self.try_script("doctor.py", "--json")
            return [found for found in json.loads(text)["findings"] if found["level"] == "problem"]

        until(healthy, "each container is healthy", seconds=60)
        until(lambda: not problems(), "the doctor finds no problem", seconds=60)

    def clear(self) -> None:
        """No job of this page is left to the next one."""
        unfinished = "SELECT id FROM jobs WHERE status IN ('queued', 'running')"
        for row in self.stack.sql(unfinished):
            self.stack.http.post(f"/api/jobs/{row['id']}/cancel")
        until(lambda: not self.stack.sql(unfinished), "no job is left", seconds=60)

    # ---- what states are made of -----------------------------------------------------------------------------------

    def try_script(self, *script: str) -> str:
        """What a script printed, whatever its exit code."""
        script = ("python", f"scripts/{script[0]}", *script[1:])
        return self.stack.execute("worker", "sh", "-c", '"$@" || true', "sh", *script)

    def redis(self, *command: str) -> str:
        return self.stack.execute("redis", "redis-cli", "-e", *command)

    def change(self, statement: str) -> None:
        """A statement without rows."""
        self.stack.execute("postgres", "psql", "--username=jobstack", "--quiet", "--command", statement)

    def busy(self, seconds: float = 3600) -> list[str]:
        """The worker's two children have something to do, so that whatever comes next waits."""
        jobs = [self.stack.create("sleep", {"seconds": seconds, "steps": 1000}, priority="high") for _ in range(2)]
        until(lambda: all(self.stack.job(job)["status"] == "running" for job in jobs), "both children are busy")
        return jobs

    def batch(self, count: int, payload: dict[str, Any], **fields: Any) -> None:
        """So many jobs of the kind `sleep`."""
        job = {"kind": "sleep", "payload": {"steps": 1, **payload}, **fields}
        answer = self.stack.http.post("/api/jobs/batch", json={"jobs": [job] * count})
        assert answer.status_code == 202, answer.text

    def set_up(self, line: str) -> None:
        """Writes a line into the clone's `.env`."""
        with self.env_file.open("a") as file:
            file.write(f"{line}\n")
