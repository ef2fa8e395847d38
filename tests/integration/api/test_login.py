"""The pages' login: what its cookie opens, for how long, and that a page of another site can use nothing of it."""

import re
from collections.abc import Callable
from time import time
from uuid import UUID

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from structlog.testing import capture_logs

from app.api import auth
from tests.integration.api.conftest import NOOP, count, created, problem

Serve = Callable[..., httpx.Client]
ANNA, OTTO = "key-of-anna-1234", "key-of-otto-1234"
KEYS = [("anna", ANNA), ("otto", OTTO)]


@pytest.fixture
def api(serve: Serve) -> httpx.Client:
    return serve(app_env="production", api_keys=KEYS)


def log_in(api: httpx.Client, key: str = ANNA, following: str = "/docs") -> str:
    """Logs in; returns the cookie's value."""
    answer = api.post("/login", data={"key": key, "next": following})
    assert (answer.status_code, answer.headers["location"]) == (303, following), answer.text
    return api.cookies[auth.COOKIE]


def sent(cookie: str) -> dict[str, str]:
    return {"Cookie": f"{auth.COOKIE}={cookie}"}


def test_a_session_opens_what_its_key_opens(api: httpx.Client, db: psycopg.Connection[DictRow]) -> None:
    problem(api.get("/api/queues"), 401)
    log_in(api, OTTO)
    created(api.post("/api/jobs", json=NOOP))
    assert api.get("/metrics").status_code == 200
    # A job belongs to the key's name, by whatever way it came.
    assert db.execute("SELECT api_key FROM jobs").fetchall() == [{"api_key": "otto"}]


def test_the_cookie_is_for_this_site_and_for_no_script(serve: Serve) -> None:
    api = serve(app_env="production", api_keys=KEYS)
    cookie = api.post("/login", data={"key": ANNA}).headers["set-cookie"].lower()
    assert {"httponly", "path=/", "samesite=strict", "max-age=43200"} <= set(cookie.split("; "))
    assert "secure" not in cookie
    assert ANNA not in cookie


@pytest.mark.parametrize(
    "next_", ["//evil.test", "/\\evil.test", "https://evil.test", "/\t/evil.test", "", "a", "/\n", "/ü"]
)
def test_nobody_is_led_elsewhere(api: httpx.Client, next_: str) -> None:
    answer = api.post("/login", data={"key": ANNA, "next": next_})
    assert answer.headers["location"] == "/"
    assert api.get("/login", params={"next": next_}).headers["location"] == "/"


@pytest.mark.parametrize("key", ["", "wrong", "key-of-anna-123", "anna", "ü", "x" * 4000, "\x00", "%"])
def test_wrong_keys_are_all_answered_alike_and_never_logged(api: httpx.Client, key: str) -> None:
    with capture_logs() as lines:
        answer = api.post("/login", data={"key": key})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    times = re.compile('data-now="[^"]*"')
    assert times.sub("", answer.text) == times.sub("", api.post("/login", data={}).text)
    [line] = [line for line in lines if line["event"] == "audit"]
    assert (line["action"], line["key"], line["client"]) == ("login_failed", "", "127.0.0.1")


def test_a_form_that_is_none(api: httpx.Client) -> None:
    problem(api.post("/login", content="&".join(f"a{i}=1" for i in range(9))), 422, "malformed-form")
    assert api.post("/login", content=b"\xff\xfe=%zz", headers={"Content-Type": "text/plain"}).status_code == 401
    problem(api.post("/login", data={"key": "x" * 5000}), 413, "too-large")


def test_cookies_that_are_forged(api: httpx.Client) -> None:
    good = log_in(api)
    api.cookies.clear()
    session, expires, signature = good.split(".")
    forged = [
        "",
        ".",
        "..",
        "x" * 5000,
        "\xff",
        good[:-1],
        f"{session}.{int(expires) + 1}.{signature}",
        f"{'0' * 32}.{expires}.{signature}",
        auth.new_cookie("key-of-nobody-123"),
        auth._signer(ANNA).get_signature("").decode(),
    ]
    for cookie in forged:
        problem(api.get("/api/kinds", headers=[(b"Cookie", f"{auth.COOKIE}={cookie}".encode("latin-1"))]), 401)
    assert api.get("/api/kinds", headers=sent(good)).status_code == 200


def test_a_session_ends_after_its_time(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(api)
    assert api.get("/api/kinds").status_code == 200
    later = time() + auth.SESSION_SECONDS + 1
    monkeypatch.setattr(auth, "time", lambda: later)
    problem(api.get("/api/kinds"), 401)


def test_a_cookie_replayed_after_logout_opens_nothing_on_any_replica(
    api: httpx.Client, serve: Serve, db: psycopg.Connection[DictRow]
) -> None:
    db.execute("TRUNCATE ended_sessions")
    db.execute("INSERT INTO ended_sessions VALUES (%s, now() - interval '1 second')", [UUID(int=1)])
    cookie = log_in(api)
    other = serve(app_env="production", api_keys=KEYS)
    assert other.get("/api/kinds", headers=sent(cookie)).status_code == 200
    answer = api.post("/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert auth.COOKIE not in api.cookies
    for replica in (api, other):
        problem(replica.get("/api/kinds", headers=sent(cookie)), 401)
    # Those whose time is over anyway are forgotten.
    assert count(db, "ended_sessions") == 1
    assert api.post("/logout").status_code == 303


def test_a_key_is_rotated_without_a_gap(serve: Serve, db: psycopg.Connection[DictRow]) -> None:
    new, body = "new-key-of-anna-1", {**NOOP, "idempotency_key": "1"}
    stages = [[("anna", ANNA)], [("anna", ANNA), ("anna", new)], [("anna", new)]]
    before, both, after = (serve(app_env="production", api_keys=keys) for keys in stages)
    cookie = log_in(before)
    for api, key in ((before, ANNA), (both, ANNA), (both, new), (after, new)):
        api.cookies.clear()
        assert api.post("/api/jobs/batch", json={"jobs": [body]}, headers={"Authorization": f"Bearer {key}"}).is_success
    # One caller to the end: its idempotency keys count on.
    assert count(db) == 1
    assert both.get("/api/kinds", headers=sent(cookie)).status_code == 200
    # The old key's sessions end with it.
    problem(after.get("/api/kinds", headers=sent(cookie)), 401)


def test_locally_nobody_needs_to_log_in_and_an_old_cookie_does_no_harm(serve: Serve) -> None:
    api = serve(app_env="local")
    created(api.post("/api/jobs", json=NOOP, headers=sent(auth.new_cookie("gone"))))


# --- other sites' pages ----------------------------------------------------------------------------------------------

ANOTHER_SITE = [
    {"Origin": "https://evil.test"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://{host}"},
    {"Origin": "http://evil.test//{host}"},
    {"Origin": "http://evil.test@{host}"},
    {"Origin": "http://["},
    {"Origin": "http://127.0.0.1:443", "Host": "127.0.0.1"},
    {"Origin": "null", "Host": ""},
]
THIS_SITE: list[dict[str, str]] = [
    {},
    {"Origin": "http://{host}"},
    # Behind a proxy that ends TLS, or that gives another Host.
    {"Origin": "https://{host}"},
    # A port that goes without saying.
    {"Origin": "https://127.0.0.1:443", "Host": "127.0.0.1"},
    {"Origin": "http://127.0.0.1", "Host": "127.0.0.1:80"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://jobs.example.com"},
    {"Sec-Fetch-Site": "none"},
]


def headers(api: httpx.Client, given: dict[str, str]) -> dict[str, str]:
    return {name: value.format(host=api.base_url.netloc.decode()) for name, value in given.items()}


@pytest.mark.parametrize("app_env", ["local", "production"])
def test_a_page_of_another_site_changes_nothing(serve: Serve, app_env: str, db: psycopg.Connection[DictRow]) -> None:
    api = serve(app_env=app_env, api_keys=KEYS)
    log_in(api)
    job = created(api.post("/api/jobs", json=NOOP))
    for given in ANOTHER_SITE:
        for path in (
            "/api/jobs",
            "/api/jobs/batch",
            f"/api/jobs/{job['id']}/cancel",
            "/api/files",
            "/login",
            "/logout",
        ):
            problem(api.post(path, json=NOOP, headers=headers(api, given)), 403, "cross-site")
        # Looking is free: browsers keep the answer from such a page.
        assert api.get("/api/jobs", headers=headers(api, given)).status_code == 200
    assert count(db) == 1
    for given in THIS_SITE:
        created(api.post("/api/jobs", json=NOOP, headers=headers(api, given)))


def test_a_stack_without_keys_answers_to_no_strangers_name(serve: Serve) -> None:
    """DNS rebinding: evil.test leads to 127.0.0.1, and to a browser its page and this API are one site."""
    local = serve(app_env="local", allowed_hosts=("stack.test",))
    for host in ("evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test."):
        problem(local.get("/api/kinds", headers={"Host": host}), 403, "unknown-host")
    for host in (
        "localhost:8000",
        "LOCALHOST",
        "api",
        "[::1]:8000",
        "[fd00::1]",
        "10.0.0.1",
        "a.localhost",
        "stack.test:1",
    ):
        assert local.get("/api/kinds", headers={"Host": host}).status_code == 200, host
    api = serve(app_env="production", api_keys=KEYS)
    assert api.get("/health/ready", headers={"Host": "healthcheck.railway.app"}).status_code == 200


def test_a_link_from_another_site_finds_the_session_again(api: httpx.Client) -> None:
    """The cookie does not come along with it."""
    answer = api.get("/login?next=/docs", headers={"Sec-Fetch-Site": "cross-site"})
    assert (answer.status_code, answer.headers["refresh"]) == (200, "0; url=/docs")
    assert "refresh" not in api.get("/login", headers={"Sec-Fetch-Site": "same-origin"}).headers
    log_in(api)
    assert api.get("/login?next=/docs").headers["location"] == "/docs"


def test_the_form_shows_what_was_sent_as_text(api: httpx.Client) -> None:
    answer = api.get("/login", params={"next": '/"><script>alert(1)</script>'})
    assert "<script>alert" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["cache-control"] == "no-store"
