"""One project for all tests here, and the table at the end."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from rich.console import Console
from rich.table import Table

from tests.e2e.conftest import engine
from tests.railway import config
from tests.railway.rehearsal import IMAGES, Rehearsal, build, docker

__all__ = ["engine"]


@dataclass
class Seen:
    """What was measured. Sizes in MB, times in seconds."""

    images: dict[str, dict[str, float]] = field(default_factory=lambda: {name: {} for name in IMAGES})
    services: dict[str, dict[str, str]] = field(default_factory=lambda: {name: {} for name in config.OURS})
    steps: dict[str, str] = field(default_factory=dict)


SEEN = pytest.StashKey[Seen]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SEEN] = Seen()


@pytest.fixture(scope="session")
def seen(pytestconfig: pytest.Config) -> Seen:
    return pytestconfig.stash[SEEN]


@pytest.fixture(scope="session")
def project(engine: None, seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """The images, built from what is committed, and the servers. Their names are not known yet, and no service runs.

    COLD=1: without what earlier builds left, for the table.
    """
    with pytest.MonkeyPatch.context() as patch:
        graph = config.evaluate(patch)
    folder = tmp_path_factory.mktemp("railway")
    folder.chmod(0o755)
    project = Rehearsal(folder, graph)
    try:
        for image, times in seen.images.items():
            tag, dockerfile = project.tag(image), f"dockerfiles/Dockerfile.{image}"
            if os.environ.get("COLD") == "1":
                times["cold"] = build(tag, dockerfile, "--no-cache")
            else:
                build(tag, dockerfile)
            times["warm"] = build(tag, dockerfile)
        project.servers()
        yield project
    finally:
        project.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seen = config.stash[SEEN]
    if not any(seen.images.values()):
        return
    images = Table("image", "over its base", "aim", "built cold", "built warm")
    for image, found in seen.images.items():
        size, cold, warm = (found.get(name) for name in ("size", "cold", "warm"))
        aim = f"{found['aim']:.0f} MB" if "aim" in found else "-"
        images.add_row(
            image,
            f"{size:.0f} MB" if size else "-",
            aim,
            f"{cold:.0f} s" if cold else "COLD=1 shows it",
            f"{warm:.1f} s" if warm else "-",
        )
    services = Table("service", "memory of 512 MB", "stopped within", "exit code")
    for service, told in seen.services.items():
        services.add_row(service, *(told.get(name, "-") for name in ("memory", "seconds", "code")))
    steps = Table("step", "seen", show_header=False)
    for step, text in seen.steps.items():
        steps.add_row(step, text)
    terminalreporter.section(f"railway-check of {docker('version', '--format', 'Docker {{.Server.Version}}')}")
    console = Console(file=terminalreporter._tw._file, width=110)
    for table in (images, services, steps):
        console.print(table)
