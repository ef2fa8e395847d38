"""Hours in small: one fault a minute, drawn from a seed, under load."""

import os

from tests.chaos.chaos import Chaos
from tests.chaos.report import Result


def minutes() -> float:
    return float(os.environ.get("MINUTES", "30"))


def run(chaos: Chaos) -> Result:
    raise NotImplementedError
