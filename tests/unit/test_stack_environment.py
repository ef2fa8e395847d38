"""`.env`: made once, with secrets; beaten by the process environment; and `.env.example` tells the truth."""

import re
import stat
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from app.settings import Settings
from scripts.stack import ROOT, Problem, environment


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / ".env"
    assert environment.make(path)
    return path


def test_secrets_are_made_and_for_the_owner_only(env_file: Path) -> None:
    values = environment.parse(env_file.read_text())
    environment.check(values)
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert set(environment.GENERATED) <= set(values)
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD"):
        assert len(values[name]) >= 32
        assert quote(values[name], safe="") == values[name], "it becomes part of a URL"
    assert re.fullmatch(r"admin:\w{32,}", values["FLOWER_BASIC_AUTH"])
    assert re.fullmatch(r"local:\w{32,}", values["API_KEYS"])


def test_every_clone_gets_other_secrets(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        environment.make(tmp_path / name)
        made.append(environment.parse((tmp_path / name).read_text()))
    assert not {made[0][name] for name in environment.GENERATED} & {made[1][name] for name in environment.GENERATED}


def test_an_env_file_that_exists_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("MINE=1\n")
    assert not environment.make(path)
    assert path.read_text() == "MINE=1\n"


def test_the_process_environment_beats_the_file(env_file: Path) -> None:
    with env_file.open("a") as file:
        file.write("LOG_LEVEL=WARNING\nQUEUE_WINDOW=5\nMY_OWN=kept\n")
    process = {"LOG_LEVEL": "DEBUG", "QUEUE_WINDOW": "", "UNRELATED": "x", "WORKER_CONCURRENCY": "7"}
    values = environment.load(process, env_file)
    assert values["LOG_LEVEL"] == "DEBUG"
    assert values["QUEUE_WINDOW"] == "5", "an empty variable counts as not set"
    assert values["WORKER_CONCURRENCY"] == "7"
    assert values["MY_OWN"] == "kept", "what a team adds to its .env reaches its handlers"
    assert "UNRELATED" not in values


def test_a_variable_set_in_the_environment_alone_is_taken(tmp_path: Path) -> None:
    assert environment.load({"API_PORT": "8123"}, tmp_path / "none")["API_PORT"] == "8123"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=plain", "plain"),
        ("A= spaces around ", "spaces around"),
        ("export A=exported", "exported"),
        ("A=value # comment", "value"),
        ("A=a#b", "a#b"),
        ("A='it # stays'", "it # stays"),
        ('A="quoted"  # comment', "quoted"),
        ("A=", ""),
        ("A=# comment", ""),
        ("# A=1", None),
        ("nonsense", None),
    ],
)
def test_lines_of_an_env_file(line: str, value: str | None) -> None:
    assert environment.parse(line).get("A") == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_PASSWORD", ""),
        ("POSTGRES_PASSWORD", "p@ss"),
        ("REDIS_PASSWORD", "a/b"),
        ("FLOWER_BASIC_AUTH", "nobody"),
        ("API_PORT", "eighty"),
        ("FLOWER_PORT", "70000"),
    ],
)
def test_what_cannot_work_is_refused_by_name(env_file: Path, name: str, value: str) -> None:
    values = {**environment.parse(env_file.read_text()), name: value}
    with pytest.raises(Problem, match=name):
        environment.check(values)


def test_a_taken_port_is_refused_with_the_variable_to_change() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(Problem) as problem:
            environment.need_free({"API_PORT": str(port)}, "API_PORT")
    assert f"API_PORT={port + 1} make up" in problem.value.hints[0]


# --- .env.example ---------------------------------------------------------------------------------------------------

EXAMPLE = environment.EXAMPLE.read_text()


def test_every_setting_is_explained() -> None:
    wanted = set()
    for name, field in Settings.model_fields.items():
        aliases = getattr(field.validation_alias, "choices", None) or [name]
        wanted |= {str(alias).upper() for alias in aliases}
    # HOST is decided by where a process runs: an image listens on all of its container's addresses, `make up` on
    # loopback.
    assert wanted - set(environment.documented()) == {"HOST"}


def test_every_variable_of_compose_is_explained() -> None:
    compose = "\n".join(
        line for line in (ROOT / "docker-compose.yml").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", compose)) | set(re.findall(r"^ +([A-Z_]+):$", compose, re.MULTILINE))
    assert used, "the pattern fits no more"
    assert used <= set(environment.documented())


def test_the_defaults_that_it_shows_are_the_defaults() -> None:
    shown = dict(re.findall(r"^# ([A-Z_]+)=(.+)$", EXAMPLE, re.MULTILINE))
    checked = 0
    for name, field in Settings.model_fields.items():
        if name.upper() in shown:
            default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            assert shown[name.upper()] == (str(default).lower() if isinstance(default, bool) else str(default)), name
            checked += 1
    assert checked > 20


def test_nothing_in_it_points_to_this_machine() -> None:
    """Platforms read the file and offer its values for production."""
    for line in EXAMPLE.splitlines():
        if "=" in line and not line.startswith("#"):
            assert line.split("=")[0] in environment.GENERATED
            assert line.endswith("="), "secrets are made, never shipped"
    assert not re.search(r"^#? ?[A-Z_]+=.*(localhost|127\.0\.0\.1)", EXAMPLE, re.MULTILINE)


def test_git_ignores_what_make_up_writes() -> None:
    names = [".env", ".run/env", ".venv/bin/python"]
    ignored = subprocess.run(["git", "check-ignore", *names], check=False, cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout.split() == names
