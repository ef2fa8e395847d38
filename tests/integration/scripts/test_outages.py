"""Every script says within seconds what cannot be reached or is missing, in one sentence, without a password."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from scripts import helper
from tests.integration.scripts.conftest import LONGEST_SECONDS, Ran
from tests.processes import ROOT
from tests.servers import Postgres, Redis, free_port

Script = Callable[..., Ran]
# All scripts in one test, each with Python's start: minutes on a busy machine.
pytestmark = pytest.mark.timeout(400)

# Each with arguments that make it ask both servers.
SCRIPTS: dict[str, tuple[Any, ...]] = {
    "task_manager": ("status", uuid4()),
    "stop_retries": ("--all-retries", "--dry-run"),
    "debug_beat_service": (),
    "trigger_cleanup_manual": ("health_check",),
    "cleanup_redis_manual": ("--dry-run",),
    "purge_celery_queue": ("--dry-run",),
    "purge_celery_duplicates": ("--dry-run",),
    "rebuild_queue": ("--dry-run",),
    "test_celery": ("--async",),
    "doctor": (),
    "run_job": ("sleep", "--payload", '{"seconds": 0}'),
}
# These work without it.
NEEDS_NO_REDIS = {"run_job"}


def test_none_is_forgotten() -> None:
    others = {"__init__", "helper", "broker", "looks", "whereabouts", "demo", "rename_project"}
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - others == SCRIPTS.keys()


def says(script: Script, name: str, part: str, **env: str) -> None:
    """In time, and by exit code."""
    if part == "Redis" and name in NEEDS_NO_REDIS:
        return
    ran = script(name, *SCRIPTS[name], **env)
    if ran.seconds >= LONGEST_SECONDS:  # a busy machine: Python's own start takes longest there
        ran = script(name, *SCRIPTS[name], **env)
    assert ran.seconds < LONGEST_SECONDS
    assert ran.json["ok"] is False
    if name == "doctor":
        assert ran.code == 1
        [found] = [
            one for one in ran.json["findings"] if one["check"] == part.lower().replace("postgresql", "postgres")
        ]
        assert found["level"] == "problem"
        text = found["message"]
    else:
        assert ran.code == 2, ran
        text = ran.json.get("error") or ran.json["message"]
    assert text.startswith(f"{part} cannot be reached at "), text
    assert "\n" not in text


@pytest.fixture
def redis_down(redis: Redis) -> Iterator[None]:
    redis.stop()
    yield
    redis.start()


@pytest.fixture
def redis_frozen(redis: Redis) -> Iterator[None]:
    redis.freeze()
    yield
    redis.thaw()


@pytest.fixture
def postgres_down(redis: Redis, postgres: Postgres) -> Iterator[None]:
    postgres.stop()
    yield
    postgres.start()


@pytest.fixture
def postgres_frozen(redis: Redis, postgres: Postgres) -> Iterator[None]:
    postgres.freeze()
    yield
    postgres.thaw()


def each(check: Callable[[str], None]) -> None:
    """For all scripts, a few at a time: mostly they wait."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, SCRIPTS))


@pytest.mark.parametrize("outage", ["redis_down", "redis_frozen", "postgres_down", "postgres_frozen"])
def test_a_server_is_away(script: Script, outage: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(outage)
    part = "Redis" if outage.startswith("redis") else "PostgreSQL"
    each(lambda name: says(script, name, part))


def test_everybody_is_silent(script: Script, environment: Redis) -> None:
    """Connections come about, and then nothing: the doctor waits for all at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        there = f"127.0.0.1:{silent.getsockname()[1]}"
        env = {
            "DATABASE_URL": f"postgresql://u:secret@{there}/d",
            "REDIS_URL": f"rediss://:secret@{there}/0",
            "CELERY_RESULT_BACKEND": f"rediss://:secret@{there}/1",
            "STORAGE_URL": "s3://bucket",
            "AWS_ENDPOINT_URL": f"http://{there}",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        ran = script("doctor", **env)
        if ran.seconds >= LONGEST_SECONDS:
            ran = script("doctor", **env)
    assert ran.seconds < LONGEST_SECONDS
    problems = [one["check"] for one in ran.json["findings"] if one["level"] == "problem"]
    assert problems == ["postgres", "redis", "storage", "certificates"], ran


def test_the_storage_is_away(script: Script, redis: Redis, db: object) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "secret"}
    away = {"STORAGE_URL": "s3://bucket", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", **keys}
    ran = script("trigger_cleanup_manual", "cleanup_old_files", **away)
    assert (ran.code, ran.json["error"].startswith("The storage is away")) == (2, True), ran
    assert len(ran.json["error"]) < 300, "not obstore's pages of debugging"


def test_wrong_passwords(script: Script, redis: Redis, postgres: Postgres) -> None:
    wrong = {"REDIS_URL": redis.url.replace(":secret@", ":wrong-secret@")}
    each(lambda name: says(script, name, "Redis", **wrong))
    wrong = {"DATABASE_URL": postgres.url.replace(":secret@", ":wrong-secret@")}
    each(lambda name: says(script, name, "PostgreSQL", **wrong))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", ""),
        ("REDIS_URL", ""),
        ("JOB_HEARTBEAT_SECONDS", "20"),
        ("REDIS_URL", "redis://:p@secret@host:no-port/0"),
        ("DATABASE_URL", "postgresql://u:p@secret@host:no-port/db"),
    ],
)
def test_a_setting_is_missing_or_wrong(script: Script, name: str, value: str, db: object) -> None:
    def check(which: str) -> None:
        ran = script(which, *SCRIPTS[which], text=True, **{name: value})
        assert ran.code == 2, ran
        assert name in ran.err
        assert len(ran.err.splitlines()) <= 2, ran

    if value:
        check("doctor")
        check("task_manager")
        check("run_job")
    else:
        each(check)


def test_help_needs_no_setting(script: Script) -> None:
    def check(name: str) -> None:
        ran = script(name, "--help", text=True, DATABASE_URL="", REDIS_URL="")
        assert ran.code == 0
        assert "--json" in ran.out or name == "task_manager"

    each(check)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("doctor", ["--no-such-option"], "No such option: --no-such-option."),
        ("task_manager", [], "Missing command."),
        ("task_manager", ["statu", "x"], "No such command 'statu'."),
        ("stop_retries", ["--check"], "Option '--check' requires an argument."),
        ("rename_project", [], "Missing argument 'NEW_NAME'."),
    ],
)
def test_what_cannot_be_called_is_one_sentence(script: Script, name: str, arguments: list[str], says: str) -> None:
    ran = script(name, *arguments, text=True)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert ran.err.startswith(says)


def test_a_name_server_that_is_silent() -> None:
    """It has no time limit of its own."""
    with pytest.raises(TimeoutError):
        helper.within(0.1, lambda: time.sleep(60))
