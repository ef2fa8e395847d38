"""What holds for every page: readable for everybody, small, quiet."""

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import SAMPLES, Complaints

Open = Callable[..., Page]
Insert = Callable[..., UUID]

# All that comes over the wire before the first page is complete, headers included.
FIRST_PAGE_BYTES = 100_000
OVER = {"attempt": 2, "started_at": "now()", "finished_at": "now()", "worker": "worker@test"}
RUNNING = {
    "status": "running",
    "attempt": 1,
    "started_at": "now()",
    "heartbeat_at": "now()",
    "worker": "worker@test",
    "lease_token": "0197f000-0000-7000-8000-000000000001",
    "lease_expires_at": "2100-01-01",
    "progress": '{"current": 1, "total": 2, "message": "half"}',
}


@pytest.fixture
def jobs(insert_job: Insert, upload: Callable[..., str]) -> list[str]:
    """The pages of jobs in each state, with each shape of value."""
    picture = upload("landscape.jpg", (SAMPLES / "landscape.jpg").read_bytes(), "image/jpeg")
    report = {"characters": 9, "words": 2, "lines": 1, "unique_words": 2, "top_words": [["the", 1], ["cat", 1]]}
    found = [
        insert_job(),
        insert_job(**RUNNING),
        insert_job(**OVER, status="failed", error='{"type": "ValueError", "message": "too bad"}'),
        insert_job("text_report", {"text": "the cat " * 20}, **OVER, status="succeeded", result=json.dumps(report)),
        insert_job(
            "thumbnail",
            {"file_id": picture, "width": 320},
            **OVER,
            status="succeeded",
            result=json.dumps({"file_id": picture, "width": 320, "height": 200}),
        ),
        insert_job("webhook", {"url": "http://a", "body": {"a": [1]}}, **OVER, status="cancelled"),
    ]
    return [f"/jobs/{job}" for job in found]


PAGES = ["/", "/jobs", "/jobs?kind=flaky&status=queued", "/new", "/schedule", "/nothing-here", "/login"]
FORMS = [f"/new/{kind}" for kind in ("flaky", "sleep", "text_report", "thumbnail", "waveform", "webhook")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_cut_off(
    open_page: Open, jobs: list[str], scheme: str, width: int, complaints: Complaints
) -> None:
    page = open_page("/", width=width, scheme=scheme)
    # The welcome of an empty stack is looked at by the other test.
    found = {}
    for path in [*PAGES, *FORMS, *jobs]:
        page.goto(path)
        found[path] = problems(page)
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            found[path].append("wider than the screen")
    assert not {path: problems for path, problems in found.items() if problems}
    complaints[:] = [text for text in complaints if "404" not in text]


def test_axe_finds_nothing_on_the_empty_stack_and_in_the_dialog(open_page: Open, insert_job: Insert) -> None:
    page = open_page("/")
    assert problems(page) == []
    page.goto(f"/jobs/{insert_job(run_at='2100-01-01')}")  # which no worker takes
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_role("dialog", name="Cancel this job?")).to_be_visible()
    assert problems(page) == []


def problems(page: Page) -> list[str]:
    """What axe says of the page as it stands, the moderate included."""
    result: dict[str, Any] = Axe().run(page).response
    return [
        f"{rule['impact']} {rule['id']}: {node['html'][:120]}"
        for rule in result["violations"]
        if rule["impact"] in ("serious", "critical", "moderate")
        for node in rule["nodes"]
    ]


def test_the_first_page_is_small_and_all_of_it_is_from_here(open_page: Open, jobs: list[str], site: str) -> None:
    page = open_page("/new")  # and then as a newcomer, with nothing kept
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.setCacheDisabled", {"cacheDisabled": True})
    sizes, urls = [], []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    session.on("Network.requestWillBeSent", lambda event: urls.append(event["request"]["url"]))
    page.goto("/", wait_until="load")
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
    print(f"first page: {sum(sizes):.0f} bytes, usable after {timing['domContentLoadedEventEnd']:.0f} ms")
    assert 0 < sum(sizes) < FIRST_PAGE_BYTES
    assert all(url.startswith(site) for url in urls), urls
