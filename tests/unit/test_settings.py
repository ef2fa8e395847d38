"""The environment: what is read, what is refused, and that refusals are sentences."""

from collections.abc import Callable
from typing import Any

import pytest

from app.settings import Settings, SettingsError, get_settings, split_redis_url, without_password

GOOD = {"DATABASE_URL": "postgresql://u:p@db/jobs", "REDIS_URL": "redis://:pw@cache:6379/0"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """read(NAME="value", OTHER=None) -> the settings of an environment; None leaves a variable out."""
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    monkeypatch.delenv("BROKER_URL", raising=False)

    def settings(**variables: str | None) -> Settings:
        for name, value in {**GOOD, **variables}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        return get_settings()

    return settings


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DATABASE_URL": None}, "DATABASE_URL: is required"),
        ({"DATABASE_URL": "sqlite:///jobs.db"}, "DATABASE_URL must start with postgresql://"),
        ({"REDIS_URL": None}, "set REDIS_URL"),
        ({"JOB_HEARTBEAT_SECONDS": "10"}, "below a third of JOB_LEASE_SECONDS"),
        ({"JOB_SOFT_TIME_LIMIT": "3600"}, "JOB_SOFT_TIME_LIMIT must be above 0 and below JOB_TIME_LIMIT"),
        ({"VISIBILITY_TIMEOUT": "3600"}, "VISIBILITY_TIMEOUT must be above JOB_TIME_LIMIT"),
        ({"WORKER_QUEUES": "default,defualt"}, "WORKER_QUEUES may name"),
        ({"WORKER_QUEUES": ","}, "WORKER_QUEUES may name"),
        ({"JOB_RETENTION_DAYS": "-1"}, "JOB_RETENTION_DAYS: Input should be greater than or equal to 0"),
        ({"FILE_RETENTION_DAYS": "1000000"}, "FILE_RETENTION_DAYS: Input should be less than or equal to 36500"),
        ({"WORKER_CONCURRENCY": "none"}, "WORKER_CONCURRENCY: Input should be a valid integer"),
        ({"STORAGE_URL": "/data/files"}, "STORAGE_URL must be file:///folder or s3://bucket/prefix"),
        ({"APP_ENV": "production"}, "STORAGE_URL is a folder"),
        ({"APP_ENV": "production", "STORAGE_URL": "s3://b", "JOBS_EXECUTION": "inline"}, "is for laptops"),
        ({"STORAGE_URL": "s3:///prefix"}, "has no bucket"),
        ({"STORAGE_URL": "s3://b", "AWS_ACCESS_KEY_ID": "k"}, "belong together"),
        ({"STORAGE_URL": "s3://b", "AWS_ENDPOINT_URL": "https://storage"}, "AWS_SECRET_ACCESS_KEY must be"),
        ({"REDIS_URL": "${{Redis.REDIS_URL}}"}, "REDIS_URL: a ${{reference}} that nobody resolved"),
        ({"STORAGE_URL": "s3://${{files.BUCKET}}"}, "STORAGE_URL: a ${{reference}} that nobody resolved"),
        ({"API_KEYS": "secret-without-a-name"}, "write it as name:key"),
        ({"API_KEYS": "a:same,b:same"}, "two names have the same key"),
        ({"API_KEYS": "a:schlüssel"}, "visible characters of ASCII"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_sentence(
    variables: dict[str, str | None], said: str, read: Callable[..., Settings]
) -> None:
    with pytest.raises(SettingsError) as refusal:
        read(**variables)
    assert said in str(refusal.value)
    # Values may be secrets.
    assert "secret" not in str(refusal.value)
    assert "pw" not in str(refusal.value)


def test_empty_means_unset(read: Callable[..., Settings]) -> None:
    """Compose passes `${NAME:-}` for what nobody set."""
    settings = read(WORKER_CONCURRENCY="", VISIBILITY_TIMEOUT="", API_KEYS="", JOB_TIME_LIMIT="")
    assert (settings.worker_concurrency, settings.visibility_timeout, settings.api_keys) == (2, None, ())
    assert settings.visibility_seconds == settings.job_time_limit + 300


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg"])
def test_every_spelling_of_postgresql_reaches_libpq(scheme: str, read: Callable[..., Settings]) -> None:
    settings = read(DATABASE_URL=f"{scheme}://u:p@db:5432/jobs?sslmode=require")
    assert settings.database_conninfo == "postgresql://u:p@db:5432/jobs?sslmode=require"


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "redis://:pw@cache:6379/0"),
        ({"CELERY_BROKER_URL": "redis://broker/1"}, "redis://broker/1"),
        ({"REDIS_URL": None, "BROKER_URL": "redis://broker/2"}, "redis://broker/2"),
        (
            {"REDIS_URL": None, "REDIS_HOST": "h", "REDIS_PASSWORD": "a/b@c", "REDIS_PORT": "7", "REDIS_DB": "3"},
            "redis://:a%2Fb%40c@h:7/3",
        ),
        ({"REDIS_URL": None, "REDIS_HOST": "fd00::1"}, "redis://[fd00::1]:6379/0"),
    ],
)
def test_where_redis_is(variables: dict[str, str | None], url: str, read: Callable[..., Settings]) -> None:
    settings = read(**variables)
    assert settings.broker_url == url
    assert settings.result_backend_url == url
    assert read(CELERY_RESULT_BACKEND="redis://results/5").result_backend_url == "redis://results/5"


def test_without_time_limits_the_visibility_timeout_is_six_hours(read: Callable[..., Settings]) -> None:
    assert read(JOB_TIME_LIMIT="0", JOB_SOFT_TIME_LIMIT="0").visibility_seconds == 6 * 3600


def test_demo_jobs_are_for_local_installations(read: Callable[..., Settings]) -> None:
    production = {"APP_ENV": "production", "STORAGE_URL": "s3://bucket"}
    assert read().demo_jobs
    assert not read(**production).demo_jobs


def test_api_keys_have_names(read: Callable[..., Settings]) -> None:
    keys = read(API_KEYS="web:abc, cron:d:e ,").api_keys
    assert [(name, key.get_secret_value()) for name, key in keys] == [("web", "abc"), ("cron", "d:e")]


@pytest.mark.parametrize(
    ("url", "plain", "tls"),
    [
        ("redis://h/0?socket_timeout=3", "redis://h/0", {}),
        ("rediss://h/0", "rediss://h/0", {"ssl_cert_reqs": "required"}),
        ("rediss://h/0?ssl_cert_reqs=CERT_NONE", "rediss://h/0", {"ssl_cert_reqs": "none"}),
        (
            "rediss://h/0?ssl_check_hostname=False",
            "rediss://h/0",
            {"ssl_cert_reqs": "required", "ssl_check_hostname": False},
        ),
        (
            "rediss://h/0?ssl_ca_certs=/ca.pem",
            "rediss://h/0",
            {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem"},
        ),
    ],
)
def test_certificates_are_verified_unless_told_otherwise(url: str, plain: str, tls: dict[str, Any]) -> None:
    assert split_redis_url(url) == (plain, tls)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:se%40cret@db:5432/x", "postgresql://u:***@db:5432/x"),
        ("redis://:secret@[fd00::1]:6379/0", "redis://:***@[fd00::1]:6379/0"),
        ("redis://h/0", "redis://h/0"),
        ("redis://h/0?password=secret", "redis://h/0?password=***"),
    ],
)
def test_urls_are_shown_without_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown
