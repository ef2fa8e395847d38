"""The dashboard as people use it: by mouse and by keyboard, on a bad line, with hostile values."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect
from psycopg.rows import DictRow

from app.settings import Settings
from tests import processes
from tests.browser.conftest import SAMPLES, Complaints, is_marked, mark
from tests.proxy import Proxy, proxy
from tests.waiting import until

Open = Callable[..., Page]
Insert = Callable[..., UUID]

OVER = {"attempt": 1, "started_at": "now()", "finished_at": "now()", "worker": "worker@test"}
FAILED = {**OVER, "status": "failed", "error": '{"type": "ValueError", "message": "too bad"}'}
SUCCEEDED = {**OVER, "status": "succeeded", "result": '{"slept": 0}'}


@pytest.fixture
def api(site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site, timeout=10) as client:
        yield client


def start(api: httpx.Client, kind: str, payload: dict[str, Any], **options: Any) -> str:
    answer = api.post("/api/jobs", json={"kind": kind, "payload": payload, **options})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def status(page: Page) -> Any:
    return page.locator("h1 .pill")


# --- a first visit -------------------------------------------------------------------------------------------------


def test_a_newcomer_starts_a_job_by_one_click_and_watches_it(open_page: Open, workers: None) -> None:
    page = open_page("/")
    expect(page.get_by_role("heading", name="Nothing has happened yet")).to_be_visible()
    page.get_by_role("button", name="Watch a first job run").click()
    page.wait_for_url("**/jobs/*")
    expect(status(page)).to_have_text("running")
    mark(page)
    bar = page.locator("#progress progress")

    def value() -> float:
        return float(bar.evaluate("bar => bar.hasAttribute('value') ? bar.value : 0"))

    seen = [0.0]
    for _ in range(3):
        seen.append(until(lambda: value() > seen[-1] and value(), "the bar moves"))
    assert seen == sorted(seen)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(status(page)).to_have_text("cancelled")
    assert is_marked(page)


def test_an_upload_becomes_a_picture_without_a_reload(open_page: Open, workers: None) -> None:
    page = open_page("/new")
    page.get_by_role("link", name="waveform").click()
    page.get_by_label("File").set_input_files(SAMPLES / "speech.wav")
    expect(page.locator(".drop.done")).to_contain_text("speech.wav")
    page.get_by_label("Chunk seconds").fill("1")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/jobs/*")
    mark(page)
    expect(status(page)).to_have_text("succeeded")
    picture = page.locator("#result img")
    until(lambda: picture.evaluate("image => image.naturalWidth") == 1200, "the picture is loaded")
    with page.expect_download() as download:
        page.locator("#result a.file").click()
    assert download.value.suggested_filename == "waveform.png"
    assert is_marked(page)


def test_a_file_can_be_dropped(open_page: Open, workers: None) -> None:
    page = open_page("/new/text_report")
    data = page.evaluate_handle(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["the cat and the hat"], "cat.txt", { type: "text/plain" }));
            return data;
        }"""
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})
    expect(page.locator(".drop.done")).to_contain_text("cat.txt")
    page.get_by_role("button", name="Start").click()
    expect(status(page)).to_have_text("succeeded")
    expect(page.locator("#result tbody tr").first).to_contain_text("the")
    expect(page.locator("#about .file")).to_contain_text("cat.txt")


def test_what_is_wrong_is_said_at_its_field(open_page: Open, complaints: Complaints) -> None:
    page = open_page("/new/thumbnail")
    page.get_by_label("Width").fill("0")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#file_id-wrong")).to_have_text("Choose a file.")
    expect(page.locator("#width-wrong")).not_to_be_empty()
    expect(page.get_by_label("File")).to_be_focused()

    # What only the server knows.
    page.goto("/new/webhook")
    page.get_by_label("Url").fill("http://user:secret@example.com/")
    page.get_by_label("Body").fill('{"a": ')
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#body-wrong")).to_contain_text("no JSON")
    page.get_by_label("Body").fill('{"a": 1}')
    page.get_by_text("When, and how urgent").click()
    page.get_by_label("Not before").fill("2999-01-01T00:00")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#url-wrong")).to_contain_text("credentials")
    expect(page.locator("#job-run_at-wrong")).to_contain_text("at most a year ahead")
    assert complaints.pop().startswith("Failed to load resource")
    page.get_by_label("Url").fill("http://169.254.169.254/")
    page.get_by_label("Not before").fill("")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/jobs/*")
    expect(page.locator("#about pre").first).to_have_text(re.compile(r'"a": 1'))


# --- moving jobs ---------------------------------------------------------------------------------------------------


def test_cancel_and_retry_ask_first(open_page: Open, workers: None, api: httpx.Client) -> None:
    job = start(api, "sleep", {"seconds": 60, "steps": 600})
    page = open_page(f"/jobs/{job}")
    expect(status(page)).to_have_text("running")
    mark(page)
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Not now").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert api.get(f"/api/jobs/{job}").json()["status"] == "running"
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(status(page)).to_have_text("cancelled")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Run it again").click()
    # Live again, though it had been over.
    expect(status(page)).to_have_text("running")
    expect(page.locator("#progress .percent")).to_have_text(re.compile(r"[1-9]\d? %"))
    assert is_marked(page)
    api.post(f"/api/jobs/{job}/cancel")
    expect(status(page)).to_have_text("cancelled")


def test_a_refusal_is_shown_in_the_dialog(
    open_page: Open, insert_job: Insert, api: httpx.Client, complaints: Complaints
) -> None:
    job = insert_job(run_at="2100-01-01")
    page = open_page(f"/jobs/{job}")
    page.get_by_role("button", name="Cancel", exact=True).click()
    assert api.post(f"/api/jobs/{job}/cancel").status_code == 202  # somebody else was faster
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("alert").filter(has_text="can't be cancelled")).to_be_visible()
    assert complaints.pop().startswith("Failed to load resource")


def test_failed_attempts_are_told_in_order(open_page: Open, workers: None, api: httpx.Client) -> None:
    job = start(api, "flaky", {"failures": 9, "error": "transient"}, max_attempts=2)
    page = open_page(f"/jobs/{job}")
    expect(status(page)).to_have_text("failed")
    expect(page.locator("#error")).to_contain_text("attempt 2 fails as asked for")
    expect(page.locator(".story b")).to_have_text(["Accepted", "Attempt 1 failed", "Attempt 2 failed", "Failed"])


def test_the_first_page_follows_what_happens(open_page: Open, workers: None, api: httpx.Client) -> None:
    page = open_page("/")
    mark(page)
    finished = page.locator("#queue-default .axis span").nth(1)

    def number() -> int:
        return int(finished.inner_text().split()[0])

    before = number()  # by the tests before this one, of which some may be counted later
    job = start(api, "text_report", {"text": "one two two"})
    row = page.locator(f"#job-{job}")
    expect(row).to_contain_text("succeeded")
    expect(page.locator("#welcome")).to_have_count(0)
    until(lambda: number() > before, "it is counted")
    assert is_marked(page)


# --- a bad line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def line(site: str) -> Iterator[Proxy]:
    with proxy(int(site.rpartition(":")[2])) as line:
        yield line


def test_a_lost_connection_is_said_and_mended(
    open_page: Open, workers: None, api: httpx.Client, line: Proxy, complaints: Complaints
) -> None:
    job = start(api, "sleep", {"seconds": 600, "steps": 1000})
    page = open_page(f"/jobs/{job}", base=f"http://127.0.0.1:{line.port}")
    expect(page.locator("#live")).to_have_text("Live")
    expect(status(page)).to_have_text("running")
    mark(page)
    # No end and no reset, just silence: nothing but the missing signs of life tells.
    line.cut()
    expect(page.get_by_role("status")).to_contain_text("The connection is lost", timeout=60_000)
    api.post(f"/api/jobs/{job}/cancel")
    line.heal()
    expect(status(page)).to_have_text("cancelled", timeout=60_000)
    expect(page.get_by_role("status")).to_be_empty()
    assert is_marked(page)
    complaints.clear()  # what was aborted


# --- lists ---------------------------------------------------------------------------------------------------------


def test_filters_search_and_pages(open_page: Open, insert_job: Insert) -> None:
    sleeps = [insert_job(**SUCCEEDED) for _ in range(60)]
    failed = insert_job("flaky", {"failures": 1}, **FAILED)
    page = open_page("/jobs")
    rows = page.locator(".jobs li")
    expect(rows).to_have_count(50)
    page.get_by_role("link", name="Older jobs").click()
    expect(rows).to_have_count(11)
    page.get_by_role("link", name="Newest").click()
    page.get_by_label("Kind").select_option("flaky")
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("ValueError")
    page.get_by_label("Status").select_option("succeeded")
    expect(page.get_by_text("No job fits")).to_be_visible()
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(50)

    search = page.get_by_label("Find a job by its id")
    search.fill(str(failed))
    search.press("Enter")
    page.wait_for_url(f"**/jobs/{failed}")
    # A Celery task's id begins with the job's; an id's beginning shows all that have it.
    search.fill(f"  {sleeps[3]}:1")
    search.press("Enter")
    page.wait_for_url(f"**/jobs/{sleeps[3]}")
    search.fill(str(failed)[:-3])
    search.press("Enter")
    expect(rows.filter(has_text=str(failed)[-12:])).to_have_count(1)
    search.fill("<b>nonsense</b>")
    search.press("Enter")
    expect(page.get_by_text("No job fits")).to_be_visible()


# --- by keyboard ---------------------------------------------------------------------------------------------------


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))


def tab_to(page: Page, name: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page).startswith(name):
            return
    raise AssertionError(f"no way to {name} by Tab")


def test_all_of_it_by_keyboard(open_page: Open, workers: None) -> None:
    page = open_page("/")
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    tab_to(page, "New job")
    page.keyboard.press("Enter")
    page.wait_for_url("**/new")
    tab_to(page, "sleep")
    page.keyboard.press("Enter")
    page.wait_for_url("**/new/sleep")
    tab_to(page, "seconds")
    page.keyboard.type("60")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*")
    expect(status(page)).to_have_text("running")
    tab_to(page, "Cancel")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert focused(page) == "Cancel"
    page.keyboard.press("Enter")
    tab_to(page, "Cancel the job")
    page.keyboard.press("Enter")
    expect(status(page)).to_have_text("cancelled")


def test_what_is_focused_stays_so_while_the_page_moves_on(open_page: Open, workers: None, api: httpx.Client) -> None:
    first = start(api, "sleep", {"seconds": 0.1})
    page = open_page("/")
    row = page.locator(f"#job-{first} a")
    row.focus()
    # Something above it that the server does not show any more, as a warning that is over.
    page.evaluate("document.querySelector('#main').prepend(document.createElement('p'))")
    second = start(api, "sleep", {"seconds": 0.1})
    expect(page.locator(f"#job-{second}")).to_contain_text("succeeded")
    expect(row).to_be_focused()


# --- colours -------------------------------------------------------------------------------------------------------


def test_colours_follow_the_system_until_somebody_chooses(open_page: Open) -> None:
    page = open_page("/", scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    toggle = page.locator("#theme")
    toggle.click()
    light = page.evaluate(ground)
    assert light != dark
    page.goto("/jobs")
    assert page.evaluate(ground) == light, "it is forgotten"
    toggle.click()
    assert page.evaluate(ground) == dark
    toggle.click()
    expect(toggle).to_have_accessible_name("Colours: as the system")


# --- hostile values ------------------------------------------------------------------------------------------------

HOSTILE = '</pre></textarea></title><img src=x onerror="window.hit=1"><script>window.hit=1</script>{{ 7*7 }}\u202egpj.'


def test_nothing_that_a_job_carries_becomes_markup(
    open_page: Open, insert_job: Insert, upload: Callable[..., str], db: psycopg.Connection[DictRow], workers: None
) -> None:
    file_id = upload(HOSTILE, b"GIF89a", "image/svg+xml; <b>")
    error = json.dumps({"type": HOSTILE, "message": HOSTILE})
    job = insert_job(
        "thumbnail",
        {"file_id": file_id, "width": 1, HOSTILE: [HOSTILE]},
        **OVER | {"status": "failed", "worker": HOSTILE, "request_id": HOSTILE, "error": error},
        progress=json.dumps({"current": 1, "total": 2, "message": HOSTILE}),
    )
    db.execute(
        "INSERT INTO job_attempts (job_id, attempt, worker, error) VALUES (%s, 1, %s, %s)",
        [job, HOSTILE, error],
    )
    strange = insert_job(HOSTILE, {HOSTILE: HOSTILE}, **SUCCEEDED)
    for path in ("/", "/jobs", f"/jobs/{job}", f"/jobs/{strange}", f"/jobs?q={HOSTILE}", "/schedule"):
        page = open_page(path)
        assert page.evaluate("window.hit") is None
        assert page.locator("img, main script").count() == 0
    page = open_page(f"/jobs/{job}")
    expect(page.locator("#error pre")).to_have_text(HOSTILE)
    expect(page.locator("#about .file")).to_contain_text(HOSTILE)


# --- a login -------------------------------------------------------------------------------------------------------


def test_with_keys_there_is_a_login_that_leads_where_one_wanted_to_go(
    open_page: Open, settings: Settings, complaints: Complaints
) -> None:
    from pydantic import SecretStr

    keyed = settings.model_copy(
        update={"app_env": "production", "api_keys": (("ada", SecretStr("a-key-that-is-long-enough")),)}
    )
    with processes.serving(keyed) as address:
        page = open_page("/jobs?status=failed", base=address)
        page.wait_for_url("**/login?next=*")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).not_to_be_empty()
        complaints.clear()  # 401
        page.get_by_label("API key").fill("a-key-that-is-long-enough")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/jobs?status=failed")
        expect(page.locator("#live")).to_have_text("Live")
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url("**/login*")
        page.goto("/")
        page.wait_for_url("**/login?next=*")
