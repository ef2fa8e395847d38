"""What the scripts share: no password gets out, and nothing else is lost with it."""

import json
from typing import Any

import pytest

from app.celery_app import celery_app
from scripts import helper
from scripts.helper import Script, scrub

SECRET = 'q"u\\o/t e?@x'


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:redis@postgres/db?sslmode=require&sslpassword=In-A-Query")
    monkeypatch.setenv("REDIS_URL", "redis://:p%40ss-word@redis/0")
    monkeypatch.setenv("POSTGRES_PASSWORD", SECRET)
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "admin:flower-password")
    monkeypatch.setenv("API_KEYS", "a:first-key, b:second-key")


@pytest.mark.parametrize(
    "hidden",
    [
        SECRET,
        repr(SECRET)[1:-1],
        json.dumps(SECRET)[1:-1],
        "q%22u%5Co%2Ft%20e%3F%40x",
        "p%40ss-word",
        "p@ss-word",
        "In-A-Query",
        "flower-password",
        "first-key",
        "second-key",
    ],
)
def test_a_password_is_hidden_however_it_is_written(hidden: str) -> None:
    assert scrub(f"could not connect to x://y:{hidden}@z") == "could not connect to x://y:***@z"
    assert scrub(f"[{hidden}]") == "[***]"


def test_a_password_that_is_a_word_is_hidden_where_passwords_stand() -> None:
    text = "redis at redis://me:redis@redis/0 and host=redis password=redis: no redis"
    assert scrub(text) == "redis at redis://me:***@redis/0 and host=*** password=***: no redis"


def test_json_stays_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_PASSWORD", '"ok": true')
    monkeypatch.setattr(helper, "_as_json", True)
    with pytest.raises(SystemExit) as ended:
        helper.stop(f"no {SECRET}", where={"redis": ["redis", SECRET, 5, None]}, error_of=ValueError(SECRET))
    assert ended.value.code == 2
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said == {"ok": False, "error": "no ***", "where": {"redis": ["redis", "***", 5, None]}, "error_of": "***"}


def test_tables_hide_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    helper.Report().table(("what", "result"), [(("task", f"failed: {SECRET}"), "red"), (("redis", "[b]"), "")])
    out = capsys.readouterr().out
    assert "failed: ***" in out
    assert "[b]" in out
    assert SECRET not in out


def test_a_prefix_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(helper, "_as_json", False)
    script = Script()
    monkeypatch.setitem(celery_app.conf.broker_transport_options, "global_keyprefix", "shop:")
    with pytest.raises(SystemExit) as ended:
        _ = script.celery
    assert ended.value.code == 2
    assert "global_keyprefix" in capsys.readouterr().err
