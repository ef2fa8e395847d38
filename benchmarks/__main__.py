"""`make bench`: this stack and its peers in turn, on servers of their own; a table, a picture, figures as JSON."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

os.environ["JOBSTACK_TESTS"] = "embedded"

import typer
from rich.console import Console

from benchmarks import idle, large, noise, report, tools
from benchmarks.contenders import Contender, Jobstack, Peer
from benchmarks.drain import drain
from benchmarks.latency import latency
from benchmarks.requests import batches, posts
from benchmarks.servers import Bench
from scripts.stack import Problem
from tests.processes import ROOT

# In a file or a pipe the table has the room that it takes.
console = Console(width=None if sys.stdout.isatty() else 150)
# As `WORKER_MAX_TASKS_PER_CHILD` is by default, and practically never.
REPLACED, KEPT = 50, 1_000_000
Measure = Callable[[Any], tuple[dict[str, float], dict[str, float]]]


def main(
    rounds: Annotated[int, typer.Option(help="How often each is measured; contenders take turns.", min=1)] = 5,
    only: Annotated[
        str, typer.Option(help="Some of: drain,drain-kept,posts,batches,latency; with --large: queued,finished.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Jobs in a drain.", min=100)] = 3000,
    short_jobs: Annotated[int, typer.Option(help="The same, for whoever is ten times as fast.", min=100)] = 20_000,
    peers: Annotated[str, typer.Option(help=f"Further ones, on drains: {','.join(tools.FURTHER)}.")] = "",
    plot: Annotated[bool, typer.Option(help="Draw a picture (fetches matplotlib the first time).")] = True,
    million: Annotated[bool, typer.Option("--large", help="A million jobs queued, and finished, instead.")] = False,
    nothing: Annotated[bool, typer.Option("--idle", help="What doing nothing costs, instead.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / ".run" / "bench",
) -> None:
    """Measures this stack, plain Celery and the hand-written template in turn and prints medians and ratios."""
    further = [name for name in peers.split(",") if name]
    if unknown := set(further) - set(tools.FURTHER):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--peers")
    try:
        tools.ensure()
    except Problem as problem:
        console.print(problem)
        raise typer.Exit(2) from None
    # So that the servers end with a run that is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    measurements: list[report.Measurement] = []
    with ExitStack() as stack:
        bench = Bench(stack)
        now = datetime.now(UTC)
        about = {
            "date": now.isoformat(timespec="seconds"),
            "rounds": rounds,
            "machine": noise.machine(bench.db, bench.redis.client.info("server")["redis_version"]),  # type: ignore[index]
        }
        if nothing:
            plan = idle.plan(bench)
        elif million:
            plan = large.plan(bench)
        else:
            plan = _plan(bench, jobs, short_jobs, further)
        if unknown := set(filter(None, only.split(","))) - set(plan):
            raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--only")
        plan = {name: entry for name, entry in plan.items() if not only or name in only.split(",")}
        path = folder / f"{now:%Y%m%d-%H%M%S}.json"
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            for name, (measure, contenders) in plan.items():
                # Nobody is always the first, who finds the machine cool, or always behind the same one.
                turn = number % len(contenders)
                for contender in contenders[turn:] + contenders[:turn]:
                    figures, seen = measure(contender)
                    measurements.append(report.Measurement(number, name, contender.name, figures, seen))
                    console.print(
                        f"  {name}: {contender.name}: {_shown(figures)}; {_shown(seen)}",
                        highlight=False,
                        soft_wrap=True,
                    )
            report.keep(path, about, measurements)
    report.show(console, measurements)
    console.print(f"The figures are in {path}", soft_wrap=True)
    if plot:
        picture = path.with_suffix(".png")
        subprocess.run([str(tools.PYTHON), "-m", "benchmarks.plot", str(path), str(picture)], cwd=ROOT, check=True)
        console.print(f"The picture is in {picture}", soft_wrap=True)


def _plan(bench: Bench, jobs: int, short_jobs: int, further: list[str]) -> dict[str, tuple[Measure, list[Contender]]]:
    """Each measure, and whom it is for."""
    ours, short = Jobstack(bench), Jobstack(bench, short=True)
    plain, template = Peer(bench, "plain"), Peer(bench, "template")
    others = [Peer(bench, name) for name in further]

    def drained(tasks_per_child: int) -> Measure:
        def measure(contender: Contender) -> tuple[dict[str, float], dict[str, float]]:
            fast = contender is short or contender.name in tools.FAST
            return drain(bench, contender, short_jobs if fast else jobs, tasks_per_child=tasks_per_child)

        return measure

    return {
        "drain": (drained(REPLACED), [plain, ours, template, short, *others]),
        "drain-kept": (drained(KEPT), [plain, ours, template, short]),
        "posts": (lambda contender: posts(bench, contender), [ours, template]),
        "batches": (lambda contender: batches(bench, contender), [ours]),
        "latency": (lambda contender: latency(bench, contender, 300), [plain, ours, template]),
    }


def _shown(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:,.3g}" if value < 1000 else f"{name} {value:,.0f}" for name, value in figures.items()
    )


if __name__ == "__main__":
    typer.run(main)
