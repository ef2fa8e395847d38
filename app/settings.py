"""Every environment variable, once: its name, its type, its default, and the rules between them.

A process that finds a broken rule refuses to start and says which variable is wrong and what would be right.
"""

import os
import re
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app import secrets, tls

QUEUES_FOR_JOBS = ("high_priority", "default", "low_priority")
# Each may come from a file as well: API_KEYS_FILE=/run/secrets/api_keys. Your own handlers' secrets belong here too.
FROM_FILES = (
    "API_KEYS",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "BROKER_URL",
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
    "DATABASE_URL",
    "FLOWER_BASIC_AUTH",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "REDIS_PASSWORD",
    "REDIS_URL",
    "SENTRY_DSN",
)
# What Railway sets in every container. Its CLI's own variables, on a laptop, are others.
RAILWAY = ("RAILWAY_ENVIRONMENT", "RAILWAY_ENVIRONMENT_ID", "RAILWAY_ENVIRONMENT_NAME", "RAILWAY_SERVICE_ID")


class SettingsError(SystemExit):
    """The environment is wrong. Derives from SystemExit: the process ends with the message and no traceback."""


class Settings(BaseSettings):
    # An empty variable counts as unset: `FOO=` in a .env file or `${FOO:-}` in compose must not shadow a default.
    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    app_env: Literal["local", "production"] = "local"
    host: str = "127.0.0.1"
    port: int = 8000
    # (name, key); a name with two keys is one caller who changes from one to the other.
    api_keys: Annotated[tuple[tuple[str, SecretStr], ...], NoDecode] = ()
    # Names besides loopback and private ones by which a local stack may be called.
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    # Requests in progress in one process, beyond which a further one is answered with 503.
    max_requests: int = Field(200, ge=1)
    # Whose X-Forwarded-For and X-Forwarded-Proto are believed: proxies are in private networks, strangers are not.
    forwarded_allow_ips: str = (
        "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,169.254.0.0/16,::1,fc00::/7,fe80::/10"
    )
    # Streams of events open in one process, beyond which a further one is answered with 503: some 20 kB each.
    max_event_streams: int = Field(2000, ge=1)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"
    # Where errors and traces go as well: app/elsewhere.py. The headers are here only to be read from a file.
    sentry_dsn: SecretStr | None = None
    otel_exporter_otlp_endpoint: str | None = None
    otel_exporter_otlp_headers: SecretStr | None = None

    database_url: SecretStr
    redis_url: SecretStr | None = None
    celery_broker_url: SecretStr | None = Field(None, validation_alias=AliasChoices("celery_broker_url", "broker_url"))
    celery_result_backend: SecretStr | None = None
    redis_host: str | None = None
    redis_port: int = 6379
    redis_db: int = 0
    redis_password: SecretStr | None = None

    storage_url: str = "file:///data/files"
    storage_shared: bool = False
    # For s3://, by the names that its clients know. Without keys they are asked of the machine, as on EC2 and ECS.
    aws_endpoint_url: str | None = None
    aws_region: str | None = None
    aws_access_key_id: SecretStr | None = None
    aws_secret_access_key: SecretStr | None = None
    # https://bucket.host/file, and not https://host/bucket/file, which some (Railway, Tigris) don't answer.
    aws_virtual_hosted_style_request: bool = False
    max_upload_bytes: int = 1024**3
    max_payload_bytes: int = 1024**2
    # 0 days: kept for ever.
    file_retention_days: int = Field(30, ge=0, le=36_500)

    worker_queues: Annotated[tuple[str, ...], NoDecode] = QUEUES_FOR_JOBS
    worker_concurrency: int = Field(2, ge=1)
    # A handler's leak ends with its child.
    worker_max_tasks_per_child: int = Field(50, ge=1)

    jobs_execution: Literal["celery", "inline"] = "celery"
    # Three heartbeats fit into a lease with room to spare: one lost packet must not cost a job its worker.
    job_heartbeat_seconds: float = Field(5, gt=0)
    job_lease_seconds: float = Field(30, gt=0)
    job_soft_time_limit: int = Field(3300, ge=0)
    job_time_limit: int = Field(3600, ge=0)
    visibility_timeout: int | None = Field(None, gt=0)
    cancel_grace_seconds: float = Field(30, ge=0)
    shutdown_grace_seconds: float = Field(60, ge=2)
    result_expires: int = Field(3600, gt=0)
    queue_window: int = Field(1000, ge=1)
    job_retention_days: int = Field(30, ge=0, le=36_500)
    schedule_timezone: str = "UTC"

    # Where the pages link to for tasks and workers.
    flower_url: str | None = None
    demo_jobs: bool = True
    webhook_allow_private: bool = False

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        keys = [tuple(entry.strip().partition(":")[::2]) for entry in value.split(",") if entry.strip()]
        if not all(name and key for name, key in keys):
            raise ValueError("write it as name:key, several separated by commas")
        # Of two names for one key, whose is the job?
        if len({key for _, key in keys}) < len(set(keys)):
            raise ValueError("two names have the same key; give each caller its own")
        # What a header carries unharmed.
        if not all(re.fullmatch("[!-~]+", key) for _, key in keys):
            raise ValueError("a key may have the visible characters of ASCII only")
        return tuple(keys)

    @field_validator("worker_queues", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _demo_jobs_only_locally(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("app_env") == "production":
            values.setdefault("demo_jobs", False)
        return values

    @model_validator(mode="before")
    @classmethod
    def _references_resolved(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Railway leaves one as it is where it was typed in the wrong place.
        unresolved = sorted(name.upper() for name, value in values.items() if "${{" in str(value))
        if unresolved:
            raise ValueError(
                f"{', '.join(unresolved)}: a ${{{{reference}}}} that nobody resolved; check the service's name"
            )
        return values

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Any:
        if urlsplit(self.database_url.get_secret_value()).scheme.partition("+")[0] not in (
            "postgres",
            "postgresql",
        ):
            yield "DATABASE_URL must start with postgresql:// (SQLite and others cannot keep the promises)"
        if self.jobs_execution == "celery" and not self._any_redis:
            yield "set REDIS_URL (or CELERY_BROKER_URL, or REDIS_HOST): redis://:password@host:6379/0"
        if self.app_env == "production":
            yield from self._problems_in_production()
        elif any(os.environ.get(name) for name in RAILWAY):
            yield "APP_ENV must be production on Railway: with local, everybody could call the API without a key"
        if self.job_heartbeat_seconds * 3 >= self.job_lease_seconds:
            yield "JOB_HEARTBEAT_SECONDS must be below a third of JOB_LEASE_SECONDS"
        if self.job_time_limit and not 0 < self.job_soft_time_limit < self.job_time_limit:
            yield "JOB_SOFT_TIME_LIMIT must be above 0 and below JOB_TIME_LIMIT"
        if self.visibility_timeout is not None and self.visibility_timeout <= self.job_time_limit:
            yield "VISIBILITY_TIMEOUT must be above JOB_TIME_LIMIT: tasks that still run would come twice"
        if (self.sentry_dsn or self.otel_exporter_otlp_endpoint) and find_spec("sentry_sdk") is None:
            yield "SENTRY_DSN and OTEL_EXPORTER_OTLP_ENDPOINT need EXTRA=elsewhere when it is built: docs/monitoring.md"
        if self.sentry_dsn and not re.fullmatch(r"https?://\w+@[^/@]+/.*\d", self.sentry_dsn.get_secret_value()):
            yield "SENTRY_DSN is not what Sentry shows as a project's DSN: https://key@host/number"
        known = {*QUEUES_FOR_JOBS, "maintenance"}
        if not self.worker_queues or not known.issuperset(self.worker_queues):
            yield f"WORKER_QUEUES may name {', '.join(sorted(known))}"
        scheme = urlsplit(self.storage_url).scheme
        if scheme not in ("file", "s3"):
            yield "STORAGE_URL must be file:///folder or s3://bucket/prefix"
        elif scheme == "s3" and bool(self.aws_access_key_id) != bool(self.aws_secret_access_key):
            yield "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together"
        elif scheme == "s3" and self.aws_endpoint_url and not self.aws_access_key_id:
            yield "AWS_ENDPOINT_URL is set, so AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be: only AWS lends keys"
        elif scheme == "s3" and not urlsplit(self.storage_url).netloc:
            yield "STORAGE_URL has no bucket: s3://bucket/prefix"

    def _problems_in_production(self) -> Any:
        if self.jobs_execution == "inline":
            yield "JOBS_EXECUTION=inline is for laptops and tests; production needs JOBS_EXECUTION=celery"
        if self.demo_jobs:
            yield "DEMO_JOBS must not be true in production: its jobs kill workers and fill memory; leave it out"
        for name, key in self.api_keys:
            if problem := weakness(key.get_secret_value()):
                yield f"API_KEYS: the key of {name!r} {problem}"
        if urlsplit(self.storage_url).scheme == "file" and not self.storage_shared:
            yield (
                "STORAGE_URL is a folder: in production use s3://bucket/prefix, or say STORAGE_SHARED=true "
                "if the API and all workers see the same folder"
            )

    @property
    def _any_redis(self) -> bool:
        return bool(self.redis_url or self.celery_broker_url or self.redis_host)

    @property
    def database_conninfo(self) -> str:
        """DATABASE_URL as libpq reads it: `postgres://` and `postgresql+driver://` are accepted spellings."""
        return tls.postgres_url(f"postgresql://{self.database_url.get_secret_value().partition('://')[2]}")

    @property
    def broker_url(self) -> str:
        """Redis for messages: CELERY_BROKER_URL, else REDIS_URL, else the REDIS_HOST family."""
        for given in (self.celery_broker_url, self.redis_url):
            if given:
                return given.get_secret_value()
        if not self.redis_host:
            raise SettingsError("jobstack: no Redis is configured; set REDIS_URL")
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        password = f":{quote(self.redis_password.get_secret_value(), '')}@" if self.redis_password else ""
        return f"redis://{password}{host}:{self.redis_port}/{self.redis_db}"

    @property
    def result_backend_url(self) -> str:
        return self.celery_result_backend.get_secret_value() if self.celery_result_backend else self.broker_url

    def unverified_connections(self) -> list[str]:
        """What to warn of, as sentences without secrets."""
        urls = {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url}
        urls |= {"CELERY_BROKER_URL": self.celery_broker_url, "CELERY_RESULT_BACKEND": self.celery_result_backend}
        found = (tls.unverified(name, url.get_secret_value()) for name, url in urls.items() if url)
        return [problem for problem in found if problem]

    @property
    def visibility_seconds(self) -> int:
        """How long Redis waits before it hands an unacknowledged message to another worker."""
        return self.visibility_timeout or (self.job_time_limit + 300 if self.job_time_limit else 6 * 3600)


def weakness(secret: str) -> str | None:
    """What is wrong with a secret in production, as the end of a sentence."""
    remedy = "; make one: openssl rand -hex 24"
    if secrets.is_placeholder(secret):
        return f"is a placeholder{remedy}"
    return f"is shorter than {secrets.SHORTEST} characters{remedy}" if len(secret) < secrets.SHORTEST else None


def flower_logins() -> str:
    """FLOWER_BASIC_AUTH: user:password, several separated by commas.

    Raises:
        SettingsError: it is not set, or is none that keeps anybody out.
    """
    settings, given = get_settings(), os.environ.get("FLOWER_BASIC_AUTH", "")
    passwords = [login.partition(":")[2] for login in given.split(",")]
    if not all(passwords):
        raise SettingsError(
            "flower cannot start: set FLOWER_BASIC_AUTH to user:password; without it, it would show every argument to "
            "anybody"
        )
    problem = next(filter(None, map(weakness, passwords)), None)
    if problem and settings.app_env == "production":
        raise SettingsError(f"flower cannot start: the password in FLOWER_BASIC_AUTH {problem}")
    return given


def split_redis_url(url: str) -> tuple[str, dict[str, Any]]:
    """A Redis URL without its query, and TLS options for `rediss://` (certificates verified unless told otherwise).

    kombu hands a query's parameters to a constructor that knows none of them, so they never stay in the URL.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    plain = urlunsplit(parts._replace(query=""))
    if parts.scheme != "rediss":
        return plain, {}
    options: dict[str, Any] = {name: value for name, value in query.items() if name.startswith("ssl_")}
    options["ssl_cert_reqs"] = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if "ssl_check_hostname" in options:  # as text, "false" would be true
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() in ("1", "true", "yes", "on")
    return plain, options


def without_password(url: str) -> str:
    """The same URL, fit for a log line."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = f"{unquote(parts.username or '')}:***@" if parts.password else parts.netloc.removesuffix(host)
    query = urlencode([(k, "***" if "password" in k else v) for k, v in parse_qsl(parts.query)], safe="*/:")
    return urlunsplit(parts._replace(netloc=user + host, query=query))


@cache
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        SettingsError: with one line per wrong variable; values are never repeated, since they may be secrets.
    """
    lines = [f"  {problem}" for problem in secrets.read_files(FROM_FILES)]
    try:
        settings = Settings()
        if not lines:
            return settings
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            text = "is required" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
            lines.append(f"  {name + ': ' if name else ''}{text}")
    raise SettingsError("jobstack cannot start, the environment is wrong:\n" + "\n".join(lines))
