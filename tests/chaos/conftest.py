"""One stack for all scenarios, and the table at the end."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import report, soak
from tests.chaos.chaos import Chaos
from tests.chaos.registry import chosen
from tests.chaos.report import Result
from tests.chaos.scenarios import load_all
from tests.e2e.conftest import engine, say
from tests.e2e.stack import ROOT

__all__ = ["engine", "say"]

RESULTS = pytest.StashKey[list[Result]]()
FOLDER = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    # Several runs may go on side by side.
    config.stash[FOLDER] = ROOT / "chaos-results" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = os.environ.get("SCENARIO", "all")
    if "scenario" in metafunc.fixturenames:
        load_all()
        try:
            found = [] if wanted == "soak" else chosen(wanted)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        metafunc.parametrize("scenario", found, ids=lambda scenario: scenario.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = os.environ.get("SCENARIO", "all")
    items[:] = [item for item in items if (item.name == "test_soak") == (wanted == "soak")]
    for item in items:
        limit = soak.minutes() * 60 + 900 if item.name == "test_soak" else 900
        item.add_marker(pytest.mark.timeout(limit))


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> list[Result]:
    return pytestconfig.stash[RESULTS]


@pytest.fixture(scope="session")
def chaos(engine: None, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder = pytestconfig.stash[FOLDER]
    folder.mkdir(parents=True)
    chaos = Chaos(tmp_path_factory.mktemp("chaos"), folder)
    try:
        chaos.up()
        yield chaos
    finally:
        if os.environ.get("KEEP") != "1":
            chaos.down()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results, folder = config.stash.get(RESULTS, []), config.stash[FOLDER]
    if not results:
        return
    report.write(folder, results)
    terminalreporter.section("chaos")
    for line in report.table(results):
        terminalreporter.line(line)
    for result in results:
        for name, value in result.measured.items():
            terminalreporter.line(f"{result.scenario}: {name} {value}")
        for violation in result.violations[:20]:
            terminalreporter.line(f"{result.scenario}: {violation}")
    # Bounds are for a machine that has time: with more than some processes a core waiting, all take longer.
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    terminalreporter.line(f"load average {load} on {os.cpu_count()} cores")
    terminalreporter.line(f"also in {folder.relative_to(ROOT)}/")
