"""The whole stack on one machine: what `make up`, `down`, `ps`, `logs`, `run` do, with Docker Compose or without.

Everything but `native` and `servers` runs before anything is installed: the standard library only, Python 3.9.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".run"
VENV = ROOT / ".venv"

# A worker gets 60 s to hand its jobs back (SHUTDOWN_GRACE_SECONDS), then 15 s to put its house in order. Compose and
# Railway grant the same.
STOP_SECONDS = 75


class Problem(Exception):
    """Something a person has to set right: what is wrong, and what to try."""

    def __init__(self, what: str, *hints: str) -> None:
        super().__init__(what)
        self.hints = hints


def say(text: str) -> None:
    print(text, flush=True)
