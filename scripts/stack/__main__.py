"""`python -m scripts.stack COMMAND`, for the Makefile. Variables, no options: MODE, SERVICE, JOB, SCRIPT, YES."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

from scripts.stack import ROOT, RUN, Problem, compose, environment, say, story, venv

MODE_FILE = RUN / "mode"
COMMANDS = ("up", "down", "ps", "logs", "run", "demo", "migrate", "clean")


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    command, *rest = arguments or [""]
    if command == "install":
        venv.ensure(*rest)
    elif command == "scratch":
        venv.enter("native")
        from scripts.stack import scratch

        return scratch.run(rest)
    elif command == "up":
        up()
    elif command in COMMANDS:
        return int(act(command) or 0)
    else:
        raise Problem(f"python -m scripts.stack {' | '.join(COMMANDS)} | install native|dev | scratch COMMAND ...")
    return 0


def up() -> None:
    if environment.make():
        say("Made .env with new secrets.")
    values = environment.load()
    environment.check(values)
    if "docker-compose.prod.yml" in values.get("COMPOSE_FILE", ""):
        raise Problem("This clone is set up for a public host (COMPOSE_FILE in .env).", "make production", "make roll")
    mode = mode_for_up(values)
    RUN.mkdir(mode=0o711, exist_ok=True)
    MODE_FILE.write_text(mode)
    if mode == "compose":
        # What native mode leaves there for scripts: the addresses of servers that are no more would mislead them.
        (RUN / "env").unlink(missing_ok=True)
    if mode == "native" and not (RUN / "supervisord.pid").exists():
        # Before a minute of installing. After a crash, what holds the ports may be ours: looked at later.
        for name in environment.PORTS:
            environment.need_free(values, name)
    module(mode).up(values)


def act(command: str) -> Any:
    mode = asked_mode() or last_mode() or ("native" if compose.reason_against() else "compose")
    if command in ("down", "ps") and mode == "native" and not native_is_up() and not venv.is_installed("native"):
        say("Nothing runs. Start it with: make up")
        return None
    if command == "clean":
        confirm()
    stack = module(mode)
    if command == "run":
        return stack.run(*script())
    if command == "logs":
        if wanted := os.environ.get("JOB"):
            return story.show(stack.log_lines(), wanted)
        return stack.logs(os.environ.get("SERVICE"))
    result = getattr(stack, command)()
    if command == "clean":
        # .env and .venv stay: the one holds what a person may have written, the other no data.
        shutil.rmtree(RUN, ignore_errors=True)
        say("Deleted. `make up` starts with an empty database.")
    return result


def module(mode: str) -> Any:
    """The module that does the work. For native mode this process goes on in .venv, with what is installed there."""
    if mode == "compose":
        return compose
    # Decided once: the process that takes over must not ask Docker again.
    os.environ["MODE"] = mode
    venv.enter("native")
    from scripts.stack import native

    return native


def asked_mode() -> str:
    mode = os.environ.get("MODE", "")
    if mode not in ("", "compose", "native"):
        raise Problem(f"MODE={mode} is not known.", "MODE=compose or MODE=native; else compose where it answers.")
    return mode


def last_mode() -> str:
    mode = MODE_FILE.read_text().strip() if MODE_FILE.exists() else ""
    return mode if mode in ("compose", "native") else ""


def native_is_up() -> bool:
    """Without anything installed: is the process alive that the pid file names?"""
    try:
        os.kill(int((RUN / "supervisord.pid").read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def mode_for_up(values: dict[str, str]) -> str:
    """What MODE says, else what runs already, else compose where an engine answers.

    Raises:
        Problem: when MODE cannot be had, or the other one runs.
    """
    asked, running = asked_mode(), ""
    if native_is_up():
        running = "native"
    elif last_mode() == "compose" and compose.is_up():
        running = "compose"
    if asked and running and asked != running:
        raise Problem(f"This clone runs in {running} mode.", f"MODE={running} make down, then MODE={asked} make up")
    if asked == "native" or running:
        return asked or running
    inline = values.get("JOBS_EXECUTION") == "inline"
    reason = "JOBS_EXECUTION=inline is for native mode" if inline else compose.reason_against()
    if asked and reason:
        raise Problem(f"Docker Compose cannot be used: {reason}.", "MODE=native make up")
    if reason:
        say(f"As processes of this machine, not in containers: {reason.splitlines()[0]}.")
    return "native" if reason else "compose"


def script() -> list[str]:
    words = shlex.split(os.environ.get("SCRIPT", ""))
    if not words:
        raise Problem("Which script?", 'make run SCRIPT="run_job.py sleep"', "They are in scripts/, each with --help.")
    return words


def confirm() -> None:
    if os.environ.get("YES") == "1":
        return
    if not sys.stdin.isatty():
        raise Problem("This deletes all jobs and files of this clone's stack.", "Say so: make clean YES=1")
    if input("Delete all jobs and files of this clone's stack? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Problem("Nothing was deleted.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        sys.stdout.flush()
        print(f"\n{problem}", *(f"  - {hint}" for hint in problem.hints), sep="\n", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted. What was started goes on: make ps, make down", file=sys.stderr)
        sys.exit(130)
