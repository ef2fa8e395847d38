"""What nobody should send, and somebody will. Never a 500, never a row, always a problem that says what was wrong.

(Uploads have their own list in test_files.py.)
"""

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from tests.integration.api.conftest import NOOP, count, problem
from tests.processes import Process

Db = psycopg.Connection[DictRow]
NOBODY = "0197f000-0000-7000-8000-000000000000"
JSON = {"Content-Type": "application/json"}
WEBHOOK = '{"kind": "webhook", "payload": {"url": "http://a.test/", "body": %s}}'


def job(kind: str = "sleep", **payload: Any) -> dict[str, Any]:
    return {"kind": kind, "payload": payload}


def headers(**each: str) -> dict[str, tuple[Any, str]]:
    """Webhooks with one of these headers."""
    return {
        f"the header {name!r}": (
            job("webhook", url="http://a.test", body=1, headers={name: value}),
            "body.webhook.payload.headers",
        )
        for name, value in each.items()
    }


def options(name: str, *values: object) -> dict[str, tuple[Any, str]]:
    """Jobs with one of these values."""
    return {f"{name} {value!r}": ({**NOOP, name: value}, f"body.flaky.{name}") for value in values}


# Bodies as text -> the status, and what the detail must speak of.
TEXTS: dict[str, tuple[str | bytes, int, str]] = {
    "nothing": ("", 422, "required"),
    "spaces": ("  ", 400, "line 1, column 3"),
    "not JSON": ("{kind: sleep}", 400, "line 1, column 2"),
    "half of it": ('{"kind": "sle', 400, "not JSON"),
    "two values": ("{} {}", 400, "Extra data"),
    "a trailing comma": ('{"kind": "sleep",}', 400, "not JSON"),
    "a comment": ("{} // no", 400, "Extra data"),
    "a BOM": (b"\xef\xbb\xbf{}", 400, "not JSON"),
    "UTF-16": (json.dumps(NOOP).encode("utf-16"), 400, "not UTF-8"),
    "latin-1": ('{"kind": "ü"}'.encode("latin-1"), 400, "not UTF-8"),
    "a raw surrogate": (b'{"kind": "\xed\xa0\x80"}', 400, "not UTF-8"),
    "a raw NUL": ('{"kind": "\x00"}', 400, "control character"),
    "a gzip": (b"\x1f\x8b\x08\x00", 400, "not UTF-8"),
    "null": ("null", 422, "body"),
    "a list": ("[]", 422, "body"),
    "a string": ('"sleep"', 422, "body"),
    "a number": ("1", 422, "body"),
    "NaN": ('{"kind": "sleep", "payload": {"seconds": NaN}}', 400, "NaN"),
    "Infinity": ('{"kind": "sleep", "payload": {"seconds": Infinity}}', 400, "Infinity"),
    "-Infinity": (WEBHOOK % "-Infinity", 400, "-Infinity"),
    "1e400": ('{"kind": "sleep", "payload": {"seconds": 1e400}}', 422, "64-bit float"),
    "2**63": (WEBHOOK % 2**63, 422, "64 bits"),
    "-2**63-1": (WEBHOOK % (-(2**63) - 1), 422, "64 bits"),
    "5,000 digits": (WEBHOOK % ("9" * 5000), 422, "64 bits"),
    "a NUL": (WEBHOOK % r'"\u0000"', 422, "U+0000"),
    "a NUL as a key": (WEBHOOK % r'{"a\u0000": 1}', 422, "U+0000"),
    "a NUL deep inside": (WEBHOOK % r'[[[{"a": ["\u0000"]}]]]', 422, "U+0000"),
    "a high surrogate": (WEBHOOK % r'"\ud800"', 422, "surrogate"),
    "a low surrogate": (WEBHOOK % r'"\udc00"', 422, "surrogate"),
    "surrogates, swapped": (WEBHOOK % r'{"\ude00\ud83d": 1}', 422, "surrogate"),
    "a key twice": ('{"kind": "sleep", "kind": "flaky", "payload": {"failures": 0}}', 422, "'kind' stands twice"),
    "a key twice, inside": (WEBHOOK % '{"a": {"b": 1, "b": 1}}', 422, "'b' stands twice"),
    "a key twice, escaped": (WEBHOOK % r'{"b": 1, "\u0062": 1}', 422, "'b' stands twice"),
    "a hundred thousand keys twice": (
        '{"kind": "webhook", ' + ",".join(f'"{n % 50_000}": 1' for n in range(100_000)) + "}",
        422,
        "stands twice",
    ),
    "101 levels of lists": (WEBHOOK % ("[" * 101 + "]" * 101), 422, "levels"),
    "10,000 levels of lists": (WEBHOOK % ("[" * 10_000 + "]" * 10_000), 422, "levels"),
    "10,000 levels of objects": (WEBHOOK % ('{"a":' * 10_000 + "1" + "}" * 10_000), 422, "levels"),
    "500,000 levels, never closed": ("[" * 500_000, 422, "levels"),
    "too much": ('{"kind": "sleep", "payload": {}, "x": "%s"}' % ("x" * 1_200_000), 413, "bytes at most"),
}

# Bodies as values -> the field that the answer must name.
JOBS: dict[str, tuple[Any, str]] = {
    "nothing in it": ({}, "body"),
    "no payload": ({"kind": "sleep"}, "body.sleep.payload"),
    "no kind": ({"payload": {}}, "body"),
    "an unknown kind": (job("nonsense"), "body"),
    "an unknown kind, long": (job("x" * 500_000), "body"),
    "a kind in capitals": (job("SLEEP", seconds=0), "body"),
    "a number as kind": ({**NOOP, "kind": 1}, "body"),
    "a list as kind": ({**NOOP, "kind": ["sleep"]}, "body"),
    "null as kind": ({**NOOP, "kind": None}, "body"),
    "a list as payload": ({"kind": "sleep", "payload": [1]}, "body.sleep.payload"),
    "null as payload": ({"kind": "sleep", "payload": None}, "body.sleep.payload"),
    "an unknown field": ({**NOOP, "colour": "red"}, "body.flaky.colour"),
    "an unknown field, long": ({**NOOP, "x" * 500_000: 1}, "body.flaky.xxx"),
    "a field of the row": ({**NOOP, "status": "succeeded"}, "body.flaky.status"),
    "a batch's field": ({**NOOP, "idempotency_key": "a"}, "body.flaky.idempotency_key"),
    "an unknown field in the payload": (job(seconds=0, colour="red"), "body.sleep.payload.colour"),
    "text as number": (job(seconds="1"), "body.sleep.payload.seconds"),
    "true as number": (job(seconds=True), "body.sleep.payload.seconds"),
    "below the minimum": (job(seconds=-1), "body.sleep.payload.seconds"),
    "above the maximum": (job(seconds=86_401), "body.sleep.payload.seconds"),
    "a fraction for an integer": (job(seconds=1, steps=1.5), "body.sleep.payload.steps"),
    "a huge float for an integer": (job(seconds=1, steps=1e300), "body.sleep.payload.steps"),
    "both sources": (job("text_report", text="a", file_id=NOBODY), "body.text_report.payload"),
    "no source": (job("text_report"), "body.text_report.payload"),
    "a bad file id": (job("text_report", file_id="../etc/passwd"), "body.text_report.payload.file_id"),
    "a number as file id": (job("text_report", file_id=1), "body.text_report.payload.file_id"),
    "no URL": (job("webhook", url="not a url", body=1), "body.webhook.payload.url"),
    "a file's URL": (job("webhook", url="file:///etc/passwd", body=1), "body.webhook.payload.url"),
    "a URL with a password": (job("webhook", url="http://u:p@a.test/", body=1), "body.webhook.payload.url"),
    **headers(
        **{
            "Host": "b.test",
            "content-type": "text/plain",
            "Transfer-Encoding": "chunked",
            "CONNECTION": "close",
            "Idempotency-Key": "mine",
            "a b": "c",
            "": "c",
            "x": "a\r\nb: c",
        }
    ),
    **options("max_attempts", 0, -1, 26, 1_000_000, 2**62, 1.5, "3", True, []),
    **options("priority", "urgent", "HIGH", "", 1),
    **options(
        "run_at",
        "2030-01-01T00:00:00",
        "2030-01-01",
        "12:00:00Z",
        "tomorrow",
        "",
        "1767225600",
        1767225600,
        True,
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59-12:00",
        "10000-01-01T00:00:00Z",
        "2030-02-30T00:00:00Z",
        "2030-01-01T25:00:00Z",
        "0000-01-01T00:00:00Z",
        "-0001-01-01T00:00:00Z",
    ),
}

KEYS = ["", "ü", "日本", "a\tb", "a" * 256]
# What can't stand in a header at all can still be said in JSON.
BATCH_KEYS = [*KEYS, " ", " a", "a ", "a\nb", "a\n", "a\x7f", 1, ["a"], {}]

QUERIES: dict[str, str] = {
    "limit=0": "limit",
    "limit=201": "limit",
    "limit=-1": "limit",
    "limit=ten": "limit",
    "limit=": "limit",
    "limit=1e2": "limit",
    "limit=99999999999999999999999": "limit",
    "limit=%00": "limit",
    "status=done": "status",
    "status=": "status",
    "status=QUEUED": "status",
    "status=%00": "status",
    "kind=nonsense": "kind",
    "kind=": "kind",
    "kind=%ff%fe": "kind",
    "queue=maintenance": "queue",
    "queue=fast": "queue",
    "cursor=": "cursor",
    "cursor=garbage": "cursor",
    "cursor=1-": "cursor",
    "cursor=-1-0197f00000007000800000000000000a": "cursor",
    "cursor=999999999999999999-0197f00000007000800000000000000a": "cursor",
    "cursor=%D9%A1-0197f00000007000800000000000000a": "cursor",
    "cursor=1-0197f00000007000800000000000000A": "cursor",
    "cursor=1-0197f00000007000800000000000000a%0A": "cursor",
    "cursor=%00": "cursor",
    f"cursor={'1' * 60_000}": "cursor",
    "cursor='; DROP TABLE jobs; --": "cursor",
    "colour=red": "colour",
    "Status=queued": "Status",
}


@pytest.mark.parametrize(("body", "status", "detail"), TEXTS.values(), ids=TEXTS)
def test_bodies_that_are_no_usable_json(api: httpx.Client, db: Db, body: Any, status: int, detail: str) -> None:
    answer = api.post("/api/jobs", content=body, headers=JSON)
    assert detail in problem(answer, status)["detail"]
    assert count(db) == 0


@pytest.mark.parametrize(("body", "field"), JOBS.values(), ids=JOBS)
def test_jobs_that_make_no_sense(api: httpx.Client, db: Db, body: Any, field: str) -> None:
    found = problem(api.post("/api/jobs", json=body), 422, "invalid-request")
    assert found["errors"][0]["field"].startswith(field)
    assert found["errors"][0]["message"] in found["detail"]
    batch = {"jobs": [{**NOOP, "idempotency_key": "good"}, body]}
    if "idempotency_key" not in body:
        found = problem(api.post("/api/jobs/batch", json=batch), 422, "invalid-request")
        assert found["errors"][0]["field"].startswith(field.replace("body", "body.jobs.1"))
    assert count(db) == 0


@pytest.mark.parametrize("key", KEYS)
def test_idempotency_keys_that_are_none(api: httpx.Client, db: Db, key: str) -> None:
    answer = api.post("/api/jobs", json=NOOP, headers=[(b"Idempotency-Key", key.encode())])
    assert "printable" in problem(answer, 422, "invalid-request")["detail"]
    assert count(db) == 0


@pytest.mark.parametrize("key", BATCH_KEYS)
def test_idempotency_keys_in_a_batch_that_are_none(api: httpx.Client, db: Db, key: Any) -> None:
    answer = api.post("/api/jobs/batch", json={"jobs": [NOOP, {**NOOP, "idempotency_key": key}]})
    errors = problem(answer, 422, "invalid-request")["errors"]
    assert [error["field"] for error in errors] == ["body.jobs.1.flaky.idempotency_key"]
    assert count(db) == 0


def test_headers_that_can_mean_two_things(api: httpx.Client, db: Db) -> None:
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    problem(api.post("/api/jobs", json=NOOP, headers=twice), 422, "two-keys")
    batch = {"jobs": [NOOP]}
    problem(api.post("/api/jobs/batch", json=batch, headers=twice[:1]), 422, "key-on-batch")
    assert count(db) == 0


@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/batch"])
@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "json"],
)
def test_json_by_another_name(api: httpx.Client, db: Db, path: str, content_type: str | None) -> None:
    # A page of another site may send these without asking; an API without keys on a laptop must not obey.
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = api.post(path, content=json.dumps(NOOP), headers=headers)
    assert "application/json" in problem(answer, 415, "not-json")["detail"]
    assert count(db) == 0


def test_json_with_parameters_is_json(api: httpx.Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert api.post("/api/jobs", content=json.dumps(NOOP), headers=headers).status_code == 202


@pytest.mark.parametrize(("query", "field"), QUERIES.items(), ids=lambda text: text[:40])
def test_lists_that_cannot_be(api: httpx.Client, query: str, field: str) -> None:
    found = problem(api.get(f"/api/jobs?{query}"), 422, "invalid-request")
    assert [error["field"] for error in found["errors"]] == [f"query.{field}"]


def test_a_parameter_given_twice(api: httpx.Client) -> None:
    problem(api.get("/api/jobs?status=queued&status=failed"), 422, "repeated-parameter")


@pytest.mark.parametrize("path", ["/api/jobs/{}", "/api/jobs/{}/cancel", "/api/jobs/{}/retry", "/api/files/{}"])
@pytest.mark.parametrize("bad", ["1", "nonsense", "%00", "..%2f..", "%ff", "0197f000-0000-7000-8000-00000000000g"])
def test_ids_that_are_none(api: httpx.Client, path: str, bad: str) -> None:
    method = "POST" if path.endswith(("cancel", "retry")) else "GET"
    answer = api.request(method, path.format(bad))
    assert answer.status_code in (404, 422)
    problem(answer, answer.status_code)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/api/jobs", "GET, POST"),
        ("OPTIONS", "/api/jobs", "GET, POST"),
        ("GET", "/api/jobs/batch", "POST"),
        ("PATCH", f"/api/jobs/{NOBODY}", "GET"),
        ("GET", f"/api/jobs/{NOBODY}/cancel", "POST"),
        ("GET", "/api/files", "POST"),
        ("POST", "/health/live", "GET"),
    ],
)
def test_methods_that_do_not_fit(api: httpx.Client, method: str, path: str, allow: str) -> None:
    answer = api.request(method, path)
    assert allow in problem(answer, 405)["detail"]
    assert answer.headers["allow"] == allow


def test_a_path_that_is_not_there(api: httpx.Client) -> None:
    assert "/docs" in problem(api.get("/api/nonsense"), 404)["detail"]


@pytest.mark.parametrize("chunked", [False, True])
def test_payloads_at_the_limit(serve: Callable[..., httpx.Client], db: Db, chunked: bool) -> None:
    api = serve(max_payload_bytes=2000)
    # As it is stored: {"file_id":null,"text":"...","top":10}
    fits = "ü" * ((2000 - len('{"file_id":null,"text":"","top":10}')) // 2)

    def post(path: str, body: Any) -> httpx.Response:
        content = json.dumps(body, ensure_ascii=False).encode()
        return api.post(path, content=iter([content]) if chunked else content, headers=JSON)

    assert post("/api/jobs", job("text_report", text=fits)).status_code == 202
    assert post("/api/jobs/batch", {"jobs": [job("text_report", text=fits)] * 16}).status_code == 202
    before = count(db)
    for too_much in (fits + "ü", "x" * 80_000):
        problem(post("/api/jobs", job("text_report", text=too_much)), 413, "too-large")
        problem(post("/api/jobs/batch", {"jobs": [NOOP, job("text_report", text=too_much)]}), 413, "too-large")
    assert count(db) == before


def test_bodies_where_none_is_wanted(api: httpx.Client) -> None:
    answer = api.post(f"/api/jobs/{NOBODY}/cancel", content=b"{nonsense", headers=JSON)
    problem(answer, 404, "unknown-job")


RAW = [
    b"hello\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x00b\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n{",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
]


def test_what_is_no_proper_http(serve_process: Callable[..., tuple[httpx.Client, Process]], db: Db) -> None:
    api, process = serve_process()
    address = urlsplit(str(api.base_url))
    for raw in RAW:
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000)[:10] not in (b"HTTP/1.1 5", b"HTTP/1.1 2"), raw[:200]
        assert api.get("/health/live").status_code == 200
    assert "Traceback" not in process.log
    assert count(db) == 0
