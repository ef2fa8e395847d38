"""`.venv/bench`: the plot's library and the further peers, fetched when they are asked for.

Apart from `.venv`, whose locks they must not change: peers want other versions of the same libraries.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from scripts.stack import VENV, Problem, venv

FOLDER = VENV / "bench"
PYTHON = FOLDER / "bin" / "python"
# These need nothing but what the stack is made of, and must have the same versions of it.
WITH_THE_STACK = ("plain", "template")
FURTHER = ("dramatiq", "procrastinate", "taskiq")
# Their drains need more jobs to be long enough.
FAST = ("dramatiq", "taskiq")


def libraries() -> Path:
    """Where its packages are."""
    return next((FOLDER / "lib").glob("python3*")) / "site-packages"


def ensure() -> None:
    """Installs requirements/bench.txt unless it is installed.

    Raises:
        Problem: when it could not be installed; pip has then said why.
    """
    lock, stamp = venv.lock("bench"), FOLDER / ".installed"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    Console(stderr=True).print("Installing requirements/bench.txt into .venv/bench ...")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
    if subprocess.run([str(PYTHON), *venv.PIP, "--require-hashes", "-r", str(lock)], check=False).returncode:
        raise Problem("pip could not install requirements/bench.txt; its reason stands above.")
    stamp.write_text(digest)
