"""The stack in containers: Docker Compose does the work, this waits, checks and explains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from scripts.stack import ROOT, Problem, environment, http, say

# `docker info` waits for ever on a frozen engine, and `make up` would seem to hang.
ANSWER_SECONDS = 10
OLDEST = (2, 22)
PROCESSES = ("api", "worker", "worker-maintenance", "beat", "flower")


def reason_against() -> str | None:
    """Why compose cannot be used here, or None where it can."""
    if not shutil.which("docker"):
        return "there is no `docker` on PATH"
    try:
        version = _output("docker", "compose", "version", "--short")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
            return f"Docker Compose {version.strip()} is older than {'.'.join(map(str, OLDEST))}"
        _output("docker", "info", "--format", "{{.ServerVersion}}")
    except subprocess.CalledProcessError as error:
        return (error.stderr or error.stdout).strip() or f"`{' '.join(error.cmd)}` failed"
    except subprocess.TimeoutExpired as error:
        return f"`{' '.join(error.cmd)}` did not answer within {ANSWER_SECONDS} s"
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=ANSWER_SECONDS).stdout


def compose(*arguments: str) -> int:
    return subprocess.run(["docker", "compose", *arguments], check=False, cwd=ROOT).returncode


def containers() -> dict[str, dict[str, Any]]:
    """This project's containers by service: what `docker compose ps` tells of each."""
    text = _output("docker", "compose", "ps", "--all", "--format", "json")
    # One object a line; versions before 2.21 answered with one list.
    return {item["Service"]: item for item in map(json.loads, text.splitlines())}


def is_up() -> bool:
    return not reason_against() and any(item["State"] == "running" for item in containers().values())


def up(values: Mapping[str, str]) -> None:
    """Build, start, wait until every health check passes, run a first job.

    Raises:
        Problem: with the last log lines of what failed already printed.
    """
    if values.get("JOBS_EXECUTION") == "inline":
        raise Problem("JOBS_EXECUTION=inline needs no containers.", "MODE=native make up")
    before = containers()
    held = {port["PublishedPort"] for item in before.values() for port in item.get("Publishers") or ()}
    for name in environment.PORTS:
        if environment.port(values, name) not in held:
            environment.need_free(values, name)
    # By name: without, `--wait` takes the end of `migrate`, which ends when it is done, for a failure.
    if compose("up", "--detach", "--build", "--wait", "--wait-timeout", "240", "--remove-orphans", *PROCESSES):
        explain()
        raise Problem(
            "The stack is not healthy; the last lines of what failed stand above.",
            "make ps, make logs SERVICE=worker",
            "Without Docker: make down, then MODE=native make up",
        )
    after = containers()
    if {item["ID"] for item in before.values()} == {item["ID"] for item in after.values()}:
        say("Everything was running already, nothing changed.")
    else:
        try:
            http.smoke_job(values)
        except Problem:
            explain("api", "worker")
            raise
    say(http.summary(values))


def explain(*services: str) -> None:
    """Print the last log lines of these services, or of all that are not well."""
    for service, item in sorted(containers().items()):
        ended_well = item["State"] == "exited" and item["ExitCode"] == 0
        # `created`: it was not started, since what it needs did not come.
        well = ended_well or item["State"] == "created" or item["Health"] == "healthy"
        if service in services or not (services or well):
            say(f"\n--- {service}: {item['State']} {item['Health']} ---")
            compose("logs", "--no-log-prefix", "--tail", "20", service)


def down() -> None:
    if compose("--profile", "*", "down", "--remove-orphans"):
        raise Problem("docker compose could not stop the stack; its reason stands above.")


def clean() -> None:
    if compose("--profile", "*", "down", "--remove-orphans", "--volumes"):
        raise Problem("docker compose could not remove the stack; its reason stands above.")


def ps() -> None:
    compose("ps", "--all")


def logs(service: str | None) -> None:
    command = ["docker", "compose", "logs", "--follow", "--tail", "100", *([service] if service else [])]
    os.chdir(ROOT)
    os.execvp("docker", command)


def log_lines() -> list[tuple[str, str]]:
    """All that is kept, as (container, line)."""
    done = subprocess.run(
        ["docker", "compose", "--ansi", "never", "logs", "--no-color"], check=False, cwd=ROOT, capture_output=True
    )
    # Some releases clear the line before each.
    text = done.stdout.decode(errors="replace").replace("\x1b[2K", "")
    pairs = (line.partition("|") for line in text.splitlines())
    return [(service.strip(), line.strip()) for service, _, line in pairs]


def run(script: str, *arguments: str) -> int:
    """A script inside the worker's container, where the URLs reach; in one of its own where that does not run, which
    is just when people want to know why."""
    terminal = () if sys.stdin.isatty() and sys.stdout.isatty() else ("--no-TTY",)
    runs = containers().get("worker", {}).get("State") == "running"
    where = ("exec",) if runs else ("run", "--rm", "--no-deps")
    return compose(*where, *terminal, "worker", "python", f"scripts/{script}", *arguments)


def demo() -> int:
    """`scripts/demo.py` in a container of its own beside the API: the samples are no part of the image."""
    terminal = () if sys.stdout.isatty() else ("--no-TTY",)
    mount = f"{ROOT / 'samples'}:/app/samples:ro"
    values = environment.load()
    urls = (f"API_URL=http://api:{values.get('PORT', '8000')}", f"SHOWN_URL={http.api_url(values)}")
    return compose(
        *("run", "--rm", "--no-deps", *terminal, "--volume", mount, "--env", urls[0], "--env", urls[1]),
        *("worker", "python", "scripts/demo.py"),
    )


def migrate() -> int:
    return compose("run", "--rm", "migrate")
