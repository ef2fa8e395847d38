"""The refusal table: with which settings a process in production does not start. docs/security.md shows it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.api.app import create_app
from app.secrets import is_placeholder
from app.settings import FROM_FILES, RAILWAY, Settings, SettingsError, flower_logins, get_settings
from tests.processes import ROOT

SECRET = "5f2c9d0be84a71d3"
GOOD = {
    "APP_ENV": "production",
    "API_KEYS": f"web:{SECRET}",
    "DATABASE_URL": "postgresql://u:p@db/jobs",
    "REDIS_URL": "redis://:p@cache:6379/0",
    "STORAGE_URL": "s3://bucket",
    "FLOWER_BASIC_AUTH": f"admin:{SECRET}",
}
# What starts: "any" stands for every process. Then what is set, and what it says.
REFUSALS: list[tuple[str, dict[str, str], str]] = [
    ("api", {"API_KEYS": ""}, "APP_ENV is not local, so API_KEYS must be set: name:key, separated by commas"),
    ("any", {"API_KEYS": "web:changeme"}, "API_KEYS: the key of 'web' is a placeholder"),
    ("any", {"API_KEYS": f"a:{SECRET},b:your-secret-key-here"}, "API_KEYS: the key of 'b' is a placeholder"),
    ("any", {"API_KEYS": "web:5f2c9d0be84a71d"}, "API_KEYS: the key of 'web' is shorter than 16 characters"),
    ("any", {"API_KEYS": SECRET}, "API_KEYS: write it as name:key, several separated by commas"),
    ("any", {"API_KEYS": f"a:{SECRET},b:{SECRET}"}, "API_KEYS: two names have the same key; give each caller its own"),
    ("flower", {"FLOWER_BASIC_AUTH": ""}, "set FLOWER_BASIC_AUTH to user:password"),
    ("flower", {"FLOWER_BASIC_AUTH": "admin:"}, "set FLOWER_BASIC_AUTH to user:password"),
    ("flower", {"FLOWER_BASIC_AUTH": f"a:{SECRET},admin"}, "set FLOWER_BASIC_AUTH to user:password"),
    ("flower", {"FLOWER_BASIC_AUTH": "admin:admin"}, "the password in FLOWER_BASIC_AUTH is a placeholder"),
    ("any", {"DEMO_JOBS": "true"}, "DEMO_JOBS must not be true in production"),
    ("any", {"STORAGE_URL": "file:///data/files"}, "STORAGE_URL is a folder: in production use s3://bucket/prefix"),
    ("any", {"JOBS_EXECUTION": "inline"}, "JOBS_EXECUTION=inline is for laptops and tests"),
    ("any", {"REDIS_URL": "${{Redis.REDIS_URL}}"}, "REDIS_URL: a ${{reference}} that nobody resolved"),
    ("any", {"APP_ENV": "local", "RAILWAY_ENVIRONMENT": "production"}, "APP_ENV must be production on Railway"),
    ("any", {"APP_ENV": "", "RAILWAY_SERVICE_ID": "1"}, "APP_ENV must be production on Railway"),
    ("any", {"API_KEYS_FILE": "/run/secrets/api_keys"}, "API_KEYS and API_KEYS_FILE are both set"),
    ("any", {"API_KEYS": "", "API_KEYS_FILE": "/nowhere"}, "API_KEYS_FILE cannot be read"),
]


def begin(process: str) -> None:
    """As far as the process comes before it connects to anybody."""
    if process == "flower":
        flower_logins()
    elif process == "api":
        create_app(get_settings())
    else:
        get_settings()


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """change({...}): the environment is the good one, with these changes."""
    for name in (*(field.upper() for field in Settings.model_fields), *FROM_FILES, *RAILWAY):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)

    def set_all(changed: dict[str, str]) -> None:
        get_settings.cache_clear()
        for name, value in {**GOOD, **changed}.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(("process", "changed", "sentence"), REFUSALS)
def test_what_would_be_open_does_not_start(
    change: Callable[[dict[str, str]], None], process: str, changed: dict[str, str], sentence: str
) -> None:
    for each in ("api", "flower", "worker") if process == "any" else (process,):
        change(changed)
        with pytest.raises(SettingsError) as refusal:
            begin(each)
        said = str(refusal.value)
        assert sentence in said
        # The variable and the remedy, and never the value.
        assert not re.search(f"{SECRET[:-1]}|changeme|your-secret|admin:", said)


def test_the_same_without_these_changes_starts(change: Callable[[dict[str, str]], None]) -> None:
    for process in ("api", "flower", "worker"):
        change({"RAILWAY_ENVIRONMENT": "production"})
        begin(process)
    # Locally nobody needs a secret.
    simple = {"API_KEYS": "web:test", "FLOWER_BASIC_AUTH": "admin:admin", "DEMO_JOBS": "true"}
    change({"APP_ENV": "local", "RAILWAY_ENVIRONMENT": "", **simple})
    begin("flower")


def test_the_documentation_has_the_table() -> None:
    page = (ROOT / "docs/security.md").read_text()
    for process, _, sentence in REFUSALS:
        general = sentence.replace("'web'", "NAME").replace("'b'", "NAME")
        assert f"| {process} | {general}" in page, sentence


@pytest.mark.parametrize("module", ["app.api", "app.flower", "worker", "beat", "app.migrate"])
def test_a_process_says_it_in_a_line(environment: object, module: str) -> None:
    changed = {
        "APP_ENV": "production",
        "STORAGE_SHARED": "true",
        "FLOWER_BASIC_AUTH": "admin:changeme",
        "DEMO_JOBS": "true",
    }
    run = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 1
    assert "DEMO_JOBS must not be true" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


PLACEHOLDERS = """
changeme change-me CHANGE_ME_123 secret password Password1 your-api-key-here <key> xxxxxxxxxxxxxxxxxxxx 0000000000000000
123412341234 key example-key default test-test-test-test my-secret placeholder admin ... REPLACE-THIS-IN-PRODUCTION
"""


@pytest.mark.parametrize("secret", ["", *PLACEHOLDERS.split(), "x" * 5000 + "!", "pass" * 5000 + "!"])
def test_placeholders(secret: str) -> None:
    assert is_placeholder(secret)


@pytest.mark.parametrize(
    "secret", [SECRET, "correct horse battery", "key-5f2c9d0be84a", "1847362950174839", "Tr0ub4dor&3"]
)
def test_secrets(secret: str) -> None:
    assert not is_placeholder(secret)


# --- secrets from files ----------------------------------------------------------------------------------------------


def test_every_secret_may_come_from_a_file() -> None:
    secret = {name.upper() for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert secret | {"BROKER_URL", "FLOWER_BASIC_AUTH"} == set(FROM_FILES)


def test_what_a_file_says_counts(change: Callable[[dict[str, str]], None], tmp_path: Path, monkeypatch: Any) -> None:
    files = {"API_KEYS": f"web:{SECRET}", "DATABASE_URL": "postgresql://u:q@db/x", "FLOWER_BASIC_AUTH": f"a:{SECRET}"}
    for name, value in files.items():
        (tmp_path / name).write_text(f"{value}\n")
    change(dict.fromkeys(files, "") | {f"{name}_FILE": str(tmp_path / name) for name in files})
    settings = get_settings()
    assert settings.database_conninfo == files["DATABASE_URL"]
    assert settings.api_keys[0][1].get_secret_value() == SECRET
    assert flower_logins() == files["FLOWER_BASIC_AUTH"]
    # Whoever is started from here reads them again, and finds each once.
    get_settings.cache_clear()
    assert get_settings() == settings


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"\xff", "it is not UTF-8"), (None, "No such file")])
def test_a_file_that_says_nothing(
    change: Callable[[dict[str, str]], None], tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    change({"DATABASE_URL": "", "DATABASE_URL_FILE": str(path)})
    with pytest.raises(SettingsError, match=f"DATABASE_URL_FILE .*{said}"):
        get_settings()
