"""The pages without a browser: whom they answer, in what, and that nothing in them is markup of strangers. What people
do with them is in tests/browser."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from app.jobs.kind import Kind, Model
from app.jobs.kinds import all_kinds
from app.web import forms, story, templating
from tests.integration.api.conftest import problem
from tests.integration.api.test_look_and_move import FAILED, RUNNING, SUCCEEDED

Insert = Callable[..., UUID]

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{ 98765*56789 }}"


@pytest.mark.parametrize("path", ["/", "/jobs", "/new", "/schedule", *(f"/new/{kind}" for kind in all_kinds())])
def test_a_page_is_kept_by_nobody_and_runs_only_what_is_from_here(api: httpx.Client, path: str) -> None:
    answer = api.get(path, headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "<style" not in answer.text
    assert " style=" not in answer.text
    assert "http://" not in answer.text.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")


@pytest.mark.parametrize("columns", [{}, RUNNING, SUCCEEDED, FAILED], ids=["queued", "running", "succeeded", "failed"])
def test_a_page_for_a_job_of_each_status(api: httpx.Client, insert_job: Insert, columns: dict[str, Any]) -> None:
    answer = api.get(f"/jobs/{insert_job(**columns)}", headers=BROWSER)
    assert answer.status_code == 200
    assert columns.get("status", "queued") in answer.text


def test_strangers_values_are_escaped_everywhere(
    api: httpx.Client, insert_job: Insert, upload: Callable[..., str], db: psycopg.Connection[DictRow]
) -> None:
    error = json.dumps({"type": HOSTILE, "message": HOSTILE})
    file_id = upload(HOSTILE, b"", HOSTILE)
    of_strangers = {"error": error, "worker": HOSTILE, "request_id": HOSTILE}
    job = insert_job("thumbnail", {"file_id": file_id, HOSTILE: HOSTILE}, **FAILED | of_strangers)
    db.execute(
        "INSERT INTO job_attempts (job_id, attempt, worker, error) VALUES (%s, 1, %s, %s)", [job, HOSTILE, error]
    )
    db.execute("INSERT INTO schedule_ticks (entry, due_at, error) VALUES (%s, now(), %s)", [HOSTILE, HOSTILE])
    unknown = insert_job(
        HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}}, **SUCCEEDED | {"result": json.dumps({HOSTILE: [HOSTILE]})}
    )
    insert_job(
        "text_report", {"text": HOSTILE * 9}, **SUCCEEDED | {"result": json.dumps({"top_words": [[HOSTILE, 1]]})}
    )
    for path in (
        "/",
        "/jobs",
        f"/jobs/{job}",
        f"/jobs/{unknown}",
        "/schedule",
        f"/jobs?q={HOSTILE}",
        f"/new/{HOSTILE}",
    ):
        text = api.get(path, headers=BROWSER).text
        assert "<img src=x" not in text, path
        assert str(98765 * 56789) not in text, path


@pytest.mark.parametrize("query", ["limit=abc", "limit=500", "status=lost", "color=red"])
def test_a_filter_that_is_none_is_named(api: httpx.Client, query: str) -> None:
    answer = api.get(f"/jobs?{query}", headers=BROWSER)
    assert answer.status_code == 422
    assert query.partition("=")[0] in answer.text


def test_a_row_that_somebody_wrote_by_hand_hides_no_others(api: httpx.Client, insert_job: Insert) -> None:
    insert_job(status="running", lease_token="00000000-0000-0000-0000-000000000000", lease_expires_at="now()")
    assert "unknown" in api.get("/", headers=BROWSER).text


def test_a_search_for_what_is_longer_than_an_id(api: httpx.Client) -> None:
    assert api.get(f"/jobs?q={'0123456789abcdef' * 4}", headers=BROWSER, follow_redirects=True).status_code == 404


def test_of_a_large_table_only_what_is_shown_is_looked_at(api: httpx.Client, insert_job: Insert) -> None:
    rows = [["a", 1]] * 100_000
    text = api.get(f"/jobs/{insert_job('webhook', {'body': rows})}", headers=BROWSER, timeout=20).text
    assert text.count("<tr>") == 200
    assert "The first 200 of 100" in text


def test_a_person_gets_a_page_and_a_program_gets_json(api: httpx.Client) -> None:
    page = api.get(f"/jobs/{uuid4()}", headers=BROWSER)
    assert page.status_code == 404
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["x-request-id"] in page.text
    problem(api.get(f"/jobs/{uuid4()}"), 404, "unknown-job")
    problem(api.get(f"/api/jobs/{uuid4()}", headers=BROWSER), 404, "unknown-job")
    assert api.get("/jobs?status=nonsense", headers=BROWSER).status_code == 422
    assert api.get("/jobs/nonsense", headers=BROWSER).status_code == 422
    assert "<h1>" in api.get("/nothing", headers=BROWSER).text


def test_assets_are_kept_by_browsers_as_long_as_they_are_the_same(api: httpx.Client) -> None:
    mine = api.get(f"/static/{templating.VERSION}/app.css")
    assert mine.status_code == 200
    assert "immutable" in mine.headers["cache-control"]
    # Of a page that another version's process made, during a deploy.
    other = api.get("/static/000000000000/app.css")
    assert other.content == mine.content
    assert other.headers["cache-control"] == "no-cache"
    for path in ("/static/x/../routes.py", "/static/x/%2e%2e/routes.py", "/static/x/..%2froutes.py", "/static/x"):
        assert api.get(path).status_code == 404


def test_search_finds_by_the_beginning_of_an_id(api: httpx.Client, insert_job: Insert) -> None:
    job = insert_job()
    for text in (str(job), f" {job}:1 ", job.hex, str(job).upper()):
        answer = api.get("/jobs", params={"q": text})
        assert answer.status_code == 303
        assert answer.headers["location"] == f"/jobs/{job}"
    assert f"/jobs/{job}" in api.get("/jobs", params={"q": str(job)[:-1]}).text
    assert f"/jobs/{job}" not in api.get("/jobs", params={"q": "ffff"}).text


# --- forms ---------------------------------------------------------------------------------------------------------


def test_each_shape_of_a_field_has_its_widget() -> None:
    class Payload(Model):
        wanted: int
        flag: bool = False
        short: str = ""
        anything: dict[str, int] | None = None

    found = {field.name: field for field in forms.fields(Kind("odd", Payload, Payload, description=""))}
    assert {name: field.widget for name, field in found.items()} == {
        "wanted": "number",
        "flag": "switch",
        "short": "text",
        "anything": "json",
    }
    assert [name for name, field in found.items() if field.required] == ["wanted"]
    report = {field.name: field for field in forms.fields(all_kinds()["text_report"])}
    assert report["file_id"].widget == "file"
    assert [name for name, field in report.items() if field.one_of] == ["file_id", "text"]
    hook = {field.name: field.widget for field in forms.fields(all_kinds()["webhook"])}
    assert hook == {"url": "line", "body": "json", "headers": "json"}


# --- a job's story -------------------------------------------------------------------------------------------------

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def row(status: str, **columns: Any) -> DictRow:
    return {
        "status": status,
        "attempt": 0,
        "created_at": NOON,
        "run_at": NOON,
        "started_at": None,
        "finished_at": None,
        "cancel_requested_at": None,
        "worker": None,
        "api_key": "",
        "now": at(100),
        **columns,
    }


def test_the_timeline_of_a_job_that_failed_once_and_runs_again() -> None:
    attempt = {"attempt": 1, "worker": "w", "error": {}, "started_at": at(10), "ended_at": at(20)}
    job = row("running", attempt=2, started_at=at(60), worker="w", api_key="ada")
    found = story.moments(job, [attempt])
    assert [moment.title for moment in found] == ["Accepted", "Attempt 1 failed", "Attempt 2 runs"]
    assert found[0].note == "with the key “ada”"
    assert [(span.x, span.width) for span in story.spans(job, found)] == [(100.0, 100.0), (600.0, 400.0)]


def test_the_timeline_of_a_job_that_failed_for_good() -> None:
    attempt = {"attempt": 1, "worker": "w", "error": {}, "started_at": at(10), "ended_at": at(20)}
    job = row("failed", attempt=1, started_at=at(10), finished_at=at(20))
    assert [moment.title for moment in story.moments(job, [attempt])] == ["Accepted", "Attempt 1 failed", "Failed"]
    assert [(span.x, span.width) for span in story.spans(job, story.moments(job, [attempt]))] == [(500.0, 500.0)]


def test_the_timeline_of_a_job_that_waits() -> None:
    assert story.moments(row("queued"), [])[-1].title == "Waits for a worker"
    assert story.moments(row("queued", run_at=at(500)), [])[-1].at == at(500)


def test_the_timeline_of_a_job_that_was_cancelled_before_it_began() -> None:
    job = row("cancelled", finished_at=at(5), cancel_requested_at=at(5))
    assert [moment.title for moment in story.moments(job, [])] == ["Accepted", "Cancel asked for", "Cancelled"]
    assert story.spans(job, story.moments(job, [])) == []


@pytest.mark.parametrize(
    ("value", "shape", "most"),
    [
        (1, "number", 0),
        (True, "line", 0),
        (None, "nothing", 0),
        ("a", "line", 0),
        ("a\nb", "text", 0),
        ([], "json", 0),
        ([["a", 3], ["b", 9]], "table", 9),
        ([["a", 3], ["b", None]], "table", 0),
        ([["a", 3], ["b", -1]], "table", 0),
        ([[1, 2], [3, 4]], "table", 0),
        ([["a", 3], ["b"]], "json", 0),
        ([["a", {}]], "json", 0),
        (["ab", "cd"], "json", 0),
    ],
)
def test_each_value_has_its_shape(value: Any, shape: str, most: float, api: httpx.Client, insert_job: Insert) -> None:
    [found] = story.values({"it": value}, None, {})
    assert (found.shape, found.most) == (shape, most)
    job = insert_job("of_another_version", {"it": value}, **SUCCEEDED | {"result": json.dumps({"it": value})})
    assert api.get(f"/jobs/{job}", headers=BROWSER).status_code == 200


def test_a_file_that_is_gone_or_was_never_one(api: httpx.Client, insert_job: Insert) -> None:
    for file_id in (str(uuid4()), "what an earlier version kept here", 7):
        job = insert_job("thumbnail", {"file_id": file_id, "width": 1})
        assert str(file_id) in api.get(f"/jobs/{job}", headers=BROWSER).text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.004, "4 ms"),
        (3.14, "3.1 s"),
        (59, "59 s"),
        (75, "1 min 15 s"),
        (3600, "1 h"),
        (90_000, "1 d 1 h"),
        (-1, "0 ms"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert templating.duration(seconds) == text
