"""A browser, and a real API with a real worker for it to look at."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from app.settings import get_settings
from tests import processes
from tests.browser import chromium
from tests.integration.conftest import QUICK
from tests.processes import Process
from tests.servers import Redis

SAMPLES = Path(__file__).parent.parent.parent / "samples"
# Of what comes over the network or from a worker, on a machine that does other things as well.
expect.set_options(timeout=20_000)


@pytest.fixture(scope="session")
def site(environment: Redis) -> Iterator[str]:
    """The API's address."""
    with processes.serving(get_settings()) as address:
        yield address


@pytest.fixture(scope="session")
def _processes(environment: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("processes")
        # The last two bring retries back to the queue.
        names = ("worker", "worker-maintenance", "beat")
        yield [stack.enter_context(processes.started(name, folder, **QUICK)) for name in names]


@pytest.fixture
def workers(_processes: list[Process], db: object, redis: Redis) -> None:
    """Workers and beat, alive, and tables that are empty."""
    for process in _processes:
        assert process.process.poll() is None, process.log


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = chromium.launch(playwright)
        yield browser
        browser.close()


class Complaints(list[str]):
    """What browsers write in red: errors in scripts, what the policy forbids, what could not be loaded."""

    def note(self, message: ConsoleMessage) -> None:
        # Containers of others came or went, which changes this machine's network: the page tries again by itself.
        if message.type in ("error", "warning") and "ERR_NETWORK_CHANGED" not in message.text:
            self.append(f"{message.text} ({message.location['url']})")


@pytest.fixture
def complaints() -> Complaints:
    """Empty at the end of each test; one that provokes some clears them."""
    return Complaints()


@pytest.fixture
def open_page(browser: Browser, site: str, db: object, complaints: Complaints) -> Iterator[Callable[..., Page]]:
    """open_page("/jobs", width=390, scheme="dark") -> that page, in a browser that remembers nothing."""
    contexts = []

    def begin(path: str = "/", *, width: int = 1440, scheme: str = "light", base: str = site) -> Page:
        context = browser.new_context(
            base_url=base,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", complaints.note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path)
        return page

    yield begin
    for context in contexts:
        context.close()
    assert complaints == []


def mark(page: Page) -> None:
    """A page that is loaded again has no mark."""
    page.evaluate("window.mark = true")


def is_marked(page: Page) -> bool:
    return bool(page.evaluate("window.mark === true"))
