"""What the scripts share: no password gets out, and nothing else is lost with it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from app.settings import get_settings
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
    monkeypatch.setenv("LOG_LEVEL", "WARNING")  # the scripts set it where it is missing, for good


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


@pytest.mark.parametrize(
    ("url", "said", "hidden"),
    [
        # Drivers and urllib cut a URL at the first of these, wherever it was meant to be.
        ("postgresql://u:Sup3r@S3cret@pg/x", "no host 'S3cret@pg'", "no host '***@pg'"),
        ("postgresql://u:Super@Secret@pg/x", 'no host "Secret@pg"', 'no host "***@pg"'),
        ("postgresql://u:Long3r/S3cret@pg/x", "as 'Long3r' or S3cret", "as '***' or ***"),
        ("postgresql://u:Long3r?S3cret@pg/x", "as 'Long3r' or S3cret", "as '***' or ***"),
        ("postgresql://u:Long3r#S3cret@pg/x", "as 'Long3r' or S3cret", "as '***' or ***"),
        # The password where the user goes.
        ("redis://S3cret@pg", "no redis://S3cret@pg", "no redis://***@pg"),
        ("rediss://Secret@pg:1/0?ssl_cert_reqs=none", "no rediss://Secret@pg:1/0", "no rediss://***@pg:1/0"),
        # What is none stays.
        ("postgresql://u:S3cret@pg/x", "at postgresql://u:***@pg/x", "at postgresql://u:***@pg/x"),
        ("redis://pg:6379/0", "at redis://pg:6379/0", "at redis://pg:6379/0"),
    ],
)
def test_a_url_that_was_written_wrongly_hides_it_too(
    url: str, said: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_URL", url)
    assert scrub(said) == hidden


@pytest.mark.parametrize("password", ["Sup3r/S3cret", "Sup3r?S3cret", "Sup3r#S3cret", "Secret/x", "12a/b"])
def test_a_url_that_cannot_be_read_is_not_quoted(
    password: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{password}@pg/x")
    get_settings.cache_clear()
    with pytest.raises(SystemExit) as ended:
        helper.settings_or_exit()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "DATABASE_URL" in said
    assert not re.search("sup3r|s3cret|secret|12a", said, re.IGNORECASE)


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
    # Another one: the real one would keep these servers for all other tests of this process.
    app = Celery(
        changes={"broker_transport_options": {"global_keyprefix": "shop:"}, "result_backend_transport_options": {}}
    )
    monkeypatch.setattr("app.celery_app.celery_app", app)
    with pytest.raises(SystemExit) as ended:
        _ = script.celery
    assert ended.value.code == 2
    assert "global_keyprefix" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["one", "two"], ["--check"]])
def test_a_usage_error_is_json_too(arguments: list[str]) -> None:
    command = [sys.executable, "scripts/stop_retries.py", "--json", *arguments]
    done = subprocess.run(command, cwd=helper.ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, "")
    said = json.loads(done.stdout)
    assert said["ok"] is False
    assert "--help" in said["error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("arguments", [["doctor.py", "--json"], ["stop_retries.py", "--json"], ["doctor.py"]])
def test_an_answer_that_cannot_be_written_is_none(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    command = [sys.executable, f"scripts/{arguments[0]}", *arguments[1:]]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=helper.ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr
