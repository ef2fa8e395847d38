"""`.venv`: made and brought to the lock when needed, by pip, every file checked against its hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.stack import ROOT, VENV, Problem, say

PYTHON = VENV / "bin" / "python"
OLDEST, NEWEST = (3, 11), (3, 14)
# `native` is what runs the stack; `dev` adds the tools of `make test` and `make lint` with the very same pins.
LOCKS = {"native": ("native", "dev"), "dev": ("dev",)}
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")


def lock(name: str) -> Path:
    return ROOT / "requirements" / f"{name}.txt"


def _digest(name: str) -> str:
    return hashlib.sha256(lock(name).read_bytes()).hexdigest()


def _stamp(name: str) -> Path:
    return VENV / f".installed-{name}"


def is_installed(name: str) -> bool:
    """Whether `.venv` holds what this lock says (or a lock that includes it)."""
    return PYTHON.exists() and any(
        _stamp(other).exists() and _stamp(other).read_text() == _digest(other) for other in LOCKS[name]
    )


def interpreter() -> str:
    """A Python that the locked wheels are made for: the one that runs this, else the newest on PATH.

    Raises:
        Problem: when there is none.
    """
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise Problem(
        f"Without Docker, Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed; this is {sys.version.split()[0]}.",
        "Name one: make up PYTHON=/path/to/python3.13",
        "Or start Docker: `make up` uses it where it answers.",
    )


def ensure(name: str) -> None:
    """Make `.venv` if it is missing, and install the lock if it changed since the last time.

    Raises:
        Problem: when venv or pip failed; pip has then said why.
    """
    if is_installed(name):
        return
    if not PYTHON.exists():
        # --clear: a folder whose interpreter went away (an upgrade of Python) is of no use.
        command = [interpreter(), "-m", "venv", "--clear", str(VENV)]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            raise Problem(
                f"Python could not make .venv: {(made.stderr or made.stdout).strip()}",
                "On Debian and Ubuntu the part that is missing is: apt install python3-venv",
            )
    say(f"Installing requirements/{name}.txt into .venv (a minute the first time) ...")
    started = time.monotonic()
    if pip("--require-hashes", "-r", str(lock(name))):
        raise Problem(
            f"pip could not install requirements/{name}.txt.",
            "Its reason stands above. Without internet access, point pip at your mirror (PIP_INDEX_URL).",
            "If .venv is broken: rm -r .venv",
        )
    _stamp(name).write_text(_digest(name))
    say(f"Installed in {time.monotonic() - started:.0f} s.")


def pip(*arguments: str, quiet: bool = False) -> int:
    return subprocess.run([str(PYTHON), *PIP, *arguments], check=False, cwd=ROOT, capture_output=quiet).returncode


def enter(name: str) -> None:
    """Go on in `.venv`: returns when this process runs there already, else replaces it by one that does."""
    ensure(name)
    if Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(PYTHON, [str(PYTHON), "-m", "scripts.stack", *sys.argv[1:]])
