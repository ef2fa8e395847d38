"""Keys of every wrong form, paths that want out, and names that want to be more than names."""

from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest

from tests.integration.api.conftest import problem

Serve = Callable[..., httpx.Client]
KEY = "5f2c9d0be84a71d3"

WRONG_KEYS: list[list[bytes]] = [
    [b""],
    [b"Bearer"],
    [b"Bearer " + KEY[:-1].encode()],
    [b"Bearer " + KEY.encode() + b"x"],
    [b"Bearer " + KEY.upper().encode()],
    [b"Bearer " + KEY.encode() + b" " + KEY.encode()],
    [b"Bearer " + "5f2c9d0be84a71d\u0663".encode()],
    [b"Bearer \xff\xfe"],
    [b"Bearer web:" + KEY.encode()],
    [b"Bearer " + b"k" * 60_000],
    [b"Basic " + KEY.encode()],
    [b"Digest username=web"],
    [b"Bearer wrong", b"Bearer " + KEY.encode()],
    [b"Bearer " + KEY.encode(), b"Bearer wrong"],
    [b"Bearer " + KEY.encode(), b"Bearer " + KEY.encode()],
]


def test_keys_of_every_wrong_form(serve: Serve) -> None:
    for app_env in ("local", "production"):
        api = serve(app_env=app_env, api_keys=[("web", KEY)])
        for values in WRONG_KEYS:
            answer = api.get("/api/kinds", headers=[(b"Authorization", value) for value in values])
            problem(answer, 401, "unauthorized")
            assert KEY not in answer.text
        # One of a megabyte is not even read; the client may see that before the answer.
        with suppress(httpx.TransportError):
            assert api.get("/api/kinds", headers={"Authorization": "Bearer " + "k" * 1024**2}).status_code == 431


PATHS = [
    "/static/../settings.py",
    "/static/%2e%2e/%2e%2e/settings.py",
    "/static/x/..%2f..%2f..%2fsettings.py",
    "/static/x//etc/passwd",
    "/static/x/%2fetc%2fpasswd",
    "/static/x/..%5c..%5csettings.py",
    "/static/x/app.css%00.txt",
    "/api/files/..%2f..%2fetc%2fpasswd/content",
    "/api/files/%2e%2e/content",
    "/api/jobs/%2e%2e%2ffiles",
    "/jobs/..%2f..%2fetc",
    "/new/..%2fsleep",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//evil.test/api/kinds",
    "/api/kinds/",
    "/API/KINDS",
    "/health/../api/kinds",
    "/login/../api/kinds",
    "/" + "a/" * 5000,
]


def test_paths_that_want_out(serve: Serve) -> None:
    api = serve(app_env="production", api_keys=[("web", KEY)])
    for path in PATHS:
        # As it is: a client of good manners would mend it.
        url = api.base_url.copy_with(raw_path=path.encode())
        answer = api.send(httpx.Request("GET", url))
        assert answer.status_code in (303, 307, 400, 401, 404, 405, 422), (path, answer.status_code)
        # To the login, or to the same path without its slash: never to another host.
        assert answer.headers.get("location", "/").removeprefix(str(api.base_url)).startswith("/"), path
        assert not answer.headers.get("location", "/").startswith("//"), path
        assert "root:" not in answer.text
        assert "class Settings" not in answer.text


HOSTILE = [
    '"><img src=x onerror=alert(1)>.txt',
    "a\u202egnp.exe",
    'a"; filename="b.html',
    "%0d%0aSet-Cookie: a=b",
    "${jndi:ldap://x}",
    "{{7*7}}.txt",
    "'; DROP TABLE jobs; --",
    "-rf",
    "ü" * 200,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_name_is_only_a_name(serve: Serve, name: str) -> None:
    api = serve()
    answer = api.post("/api/files", files={"file": (name, b"<script>alert(1)</script>", "text/html")})
    if answer.status_code == 422:
        return
    file = answer.json()
    content = api.get(f"/api/files/{file['id']}/content")
    disposition = content.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert disposition.isascii()
    assert disposition.count('"') == 2
    assert (content.headers["x-content-type-options"], "set-cookie" in content.headers) == ("nosniff", False)
    assert content.headers["content-security-policy"].startswith("sandbox")
    job = api.post("/api/jobs", json={"kind": "text_report", "payload": {"file_id": file["id"]}}).json()
    page = api.get(f"/jobs/{job['id']}")
    assert page.status_code == 200
    assert "<img src=x" not in page.text
    assert "49.txt" not in page.text
