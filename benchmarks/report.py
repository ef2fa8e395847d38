"""Medians, spreads and ratios of one run: as a table, and as JSON."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.noise import NOISY_CORES

# What is divided by: the peers that this stack is made of, and with --large a table with few jobs.
BASES = ("plain", "template", "few")


@dataclass
class Measurement:
    """One measure of one contender in one round."""

    round: int
    measure: str
    contender: str
    figures: dict[str, float]
    noise: dict[str, float]


@dataclass
class Line:
    """A figure of one contender over all rounds. `ratios`: to each base of the same round."""

    measure: str
    contender: str
    figure: str
    values: list[float]
    ratios: dict[str, list[float]]
    noisy: int  # rounds with somebody else on the machine


def lines(measurements: list[Measurement]) -> list[Line]:
    rounds: dict[tuple[str, str], dict[int, Measurement]] = defaultdict(dict)
    for one in measurements:
        rounds[one.measure, one.contender][one.round] = one
    return [
        Line(
            measure,
            contender,
            figure,
            [one.figures[figure] for one in own.values()],
            {base: ratios for base in BASES if (ratios := list(_ratios(own, rounds.get((measure, base), {}), figure)))},
            sum(one.noise["foreign"] > NOISY_CORES for one in own.values()),
        )
        for (measure, contender), own in rounds.items()
        for figure in next(iter(own.values())).figures
    ]


def _ratios(own: dict[int, Measurement], base: dict[int, Measurement], figure: str) -> Iterator[float]:
    for number, one in own.items():
        if number in base and base[number] is not one and base[number].figures.get(figure):
            yield one.figures[figure] / base[number].figures[figure]


def table(found: list[Line]) -> Table:
    bases = [base for base in BASES if any(base in line.ratios for line in found)]
    titles = ("", "", "median", "min - max", *(f"/ {base} (min - max)" for base in bases), "noisy rounds")
    shown = Table(*titles, box=None, header_style="bold", pad_edge=False)
    before = ""
    for line in found:
        if (group := f"{line.measure}: {line.contender}") != before and before:
            shown.add_section()
        shown.add_row(
            "" if group == before else group,
            line.figure,
            _number(statistics.median(line.values)),
            f"{_number(min(line.values))} - {_number(max(line.values))}",
            *(_spread(line.ratios.get(base)) for base in bases),
            f"{line.noisy} of {len(line.values)}" if line.noisy else "",
        )
        before = group
    return shown


def _spread(ratios: list[float] | None) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def keep(path: Path, about: dict[str, Any], measurements: list[Measurement]) -> None:
    """The figures as they are, and what the table says of them. Written after every round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**about, "lines": [asdict(line) for line in lines(measurements)]}
    path.write_text(json.dumps({**found, "measurements": [asdict(one) for one in measurements]}, indent=1))


def show(console: Console, measurements: list[Measurement]) -> None:
    console.print(table(lines(measurements)))
    if any(line.noisy for line in lines(measurements)):
        console.print(
            f"noisy: others on this machine took more than {NOISY_CORES:g} of a core meanwhile; compare ratios of one "
            "round, and CPU rather than time."
        )
