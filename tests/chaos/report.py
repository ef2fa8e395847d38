"""What came out: a table for people, and the same as JSON and Markdown."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.registry import Scenario


@dataclass
class Result:
    """Of one scenario. Seconds; `recovery` is None where no job was hit."""

    scenario: str
    promises: tuple[int, ...]
    jobs: int
    lost: int
    double: int
    recovery: float | None
    bound: float | None
    seconds: float
    violations: list[str] = field(default_factory=list)
    # What the scenario measured besides, such as {"dispatch ms": 4.1}.
    measured: dict[str, float | str] = field(default_factory=dict)


def broken_off(scenario: Scenario, error: Exception) -> Result:
    """Of a scenario that came to no end: what it waited for never came."""
    return Result(
        scenario.name, scenario.promises, 0, 0, 0, None, scenario.bound, 0, violations=[f"broken off: {error!r}"[:500]]
    )


HEAD = ("scenario", "promises", "jobs", "lost", "double", "recovery s", "bound s", "took s", "result")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    return [
        (
            result.scenario,
            " ".join(map(str, result.promises)),
            str(result.jobs),
            str(result.lost),
            str(result.double),
            _number(result.recovery),
            _number(result.bound),
            _number(result.seconds),
            f"{len(result.violations)} VIOLATED" if result.violations else "ok",
        )
        for result in results
    ]


def table(results: list[Result]) -> list[str]:
    """Aligned lines for a terminal."""
    lines = [HEAD, *rows(results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def write(folder: Path, results: list[Result]) -> None:
    """results.json and results.md."""
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    lines = [HEAD, ("---",) * len(HEAD), *rows(results)]
    (folder / "results.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
