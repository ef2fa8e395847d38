"""The stack as processes of this machine, under supervisord: one that crashes is started again.

Each has its log in .run/logs, and in .run/bin its start script with all of its environment, which a person can run by
hand as well. PostgreSQL, Redis and our own processes are three groups; supervisord compares its configuration with the
one it was started from and restarts the groups that differ. Ours differ when code, settings or the lock do.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
import psycopg
import redis
from supervisor.xmlrpc import SupervisorTransport

from scripts.stack import ROOT, RUN, STOP_SECONDS, Problem, environment, http, say, servers, venv

BIN, LOGS, DATA, HEALTH = RUN / "bin", RUN / "logs", RUN / "postgres", RUN / "health"
CONFIG, PORTS, SETTINGS = RUN / "supervisord.conf", RUN / "ports.json", RUN / "settings.json"
SERVER_FOLDERS = (str(DATA), str(RUN / "redis"))
# For people and scripts: what the processes have in their environment.
ENVIRONMENT = RUN / "env"
# Any of these in the environment means: that one, and no server of ours.
REDIS_VARIABLES = ("REDIS_URL", "CELERY_BROKER_URL", "BROKER_URL", "REDIS_HOST")
CODE = ("app", "worker", "beat", "migrations", "alembic.ini", "requirements/native.txt")
# In the environment of every process of this stack: how those are found that a killed supervisord left behind.
MARK = hashlib.sha256(str(RUN).encode()).hexdigest()[:16]
UNWANTED = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "HOST", "PORT", "PWD"}


class Stack:
    """What the settings say should run."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        self.values["API_PORT"] = values.get("API_PORT") or values.get("PORT") or str(environment.PORTS["API_PORT"])
        self.inline = values.get("JOBS_EXECUTION") == "inline"
        self.own_postgres = not values.get("DATABASE_URL")
        self.own_redis = not self.inline and not any(values.get(name) for name in REDIS_VARIABLES)
        self.ports = _ports(self.values)

    @property
    def environment(self) -> dict[str, str]:
        """What every process of ours gets, the same for all."""
        values, password = self.values, self.values.get
        made = {
            "STORAGE_URL": (RUN / "files").as_uri(),
            "STORAGE_SHARED": "true",  # all processes are on this machine
            "JOBSTACK_RUN_DIR": str(HEALTH),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        if self.own_postgres:
            port = self.ports["postgres"]
            made["DATABASE_URL"] = f"postgresql://jobstack:{password('POSTGRES_PASSWORD')}@127.0.0.1:{port}/jobstack"
        if self.own_redis:
            made["REDIS_URL"] = f"redis://:{password('REDIS_PASSWORD')}@127.0.0.1:{self.ports['redis']}/0"
        made["API_URL"] = http.api_url(values)
        return {**made, **values, "HOST": "127.0.0.1"}

    @property
    def processes(self) -> dict[str, tuple[dict[str, str], list[str]]]:
        """Our processes: what each has besides in its environment, and its command."""
        python, values = str(venv.PYTHON), self.values
        port = {"PORT": self.values["API_PORT"]}
        if self.inline:
            return {"inline": (port, [python, "-m", "worker.inline"])}
        flower_port = str(environment.port(self.values, "FLOWER_PORT"))
        flower_url = values.get("FLOWER_URL", f"http://127.0.0.1:{flower_port}")
        return {
            "api": ({**port, "FLOWER_URL": flower_url}, [python, "-m", "app.api"]),
            "worker": ({}, [python, "-m", "worker"]),
            "worker-maintenance": (
                {"WORKER_QUEUES": "maintenance", "WORKER_CONCURRENCY": values.get("MAINTENANCE_CONCURRENCY", "2")},
                [python, "-m", "worker"],
            ),
            "beat": ({}, [python, "-m", "beat"]),
            "flower": (
                {"FLOWER_PORT": flower_port, "FLOWER_ADDRESS": "127.0.0.1"},
                [python, "-m", "app.flower"],
            ),
        }

    def process_environment(self, name: str) -> dict[str, str]:
        own, _ = self.processes[name]
        return {**self.environment, **own}

    def health(self, name: str) -> str:
        """`ok`, or what is wrong with this process."""
        if name in ("api", "inline"):
            status, answer = http.call(f"{http.api_url(self.values)}/health/ready")
            return str(answer.get("status")) if isinstance(answer, dict) else f"{status} {answer}"
        if name == "flower":
            status, answer = http.call(f"http://127.0.0.1:{environment.port(self.values, 'FLOWER_PORT')}/healthcheck")
            return "ok" if status == 200 else f"{status} {answer}"
        if name == "postgres":
            return "ok" if _port_answers(self.ports["postgres"]) else "does not answer"
        if name == "redis":
            return "ok" if _port_answers(self.ports["redis"]) else "does not answer"
        module = name.partition("-")[0]
        checked = subprocess.run(
            [str(venv.PYTHON), "-m", f"{module}.health"],
            check=False,
            cwd=ROOT,
            env={**os.environ, **self.process_environment(name)},
            capture_output=True,
            text=True,
        )
        return "ok" if checked.returncode == 0 else (checked.stdout + checked.stderr).strip() or "unhealthy"


def _ports(values: Mapping[str, str]) -> dict[str, int]:
    """The ports of PostgreSQL and Redis: free ones, then always the same, so that two clones run side by side."""
    ports = json.loads(PORTS.read_text()) if PORTS.exists() else {}
    if not is_running():
        taken = {int(values["API_PORT"]), environment.port(values, "FLOWER_PORT")}
        for name in ("postgres", "redis"):
            while ports.get(name) in {None, *taken} or not environment.is_free(ports[name]):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    ports[name] = probe.getsockname()[1]
            taken.add(ports[name])
        PORTS.write_text(json.dumps(ports))
    return {name: int(port) for name, port in ports.items()}


def _port_answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


# --- the files that supervisord starts from -------------------------------------------------------------------------


def _write(path: Path, text: str, mode: int = 0o600) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Created with its mode: a moment of being readable by others is one too many for a password.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.write(text)
    return text


def _script(name: str, *lines: str, mode: int = 0o755) -> str:
    return _write(BIN / name, "\n".join(["#!/bin/sh", "# Written by `make up`.", *lines, ""]), mode)


def _hash(*texts: str | bytes) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() if isinstance(text, str) else text)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def code_version() -> str:
    """A hash over the files that the processes load at their start."""
    files = sorted(
        path
        for entry in CODE
        for path in ([ROOT / entry] if (ROOT / entry).is_file() else (ROOT / entry).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    return _hash(*(part for path in files for part in (str(path.relative_to(ROOT)), path.read_bytes())))


def control_socket() -> Path:
    """Where supervisord listens: in .run, unless that path is too long for a socket (supervisord adds its pid)."""
    path = RUN / "supervisor.sock"
    if len(os.fsencode(path)) < 90:
        return path.relative_to(ROOT)
    folder = Path(tempfile.gettempdir()) / f"jobstack-{os.getuid()}-{MARK}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Problem(f"{folder} belongs to somebody else.")
    return folder / "supervisor.sock"


def write_config(stack: Stack) -> None:
    """Everything below .run that says what runs, and how.

    Paths in supervisord.conf are relative to this clone, where supervisord runs: its format has no way to write down
    every path that a folder can have.
    """
    LOGS.mkdir(exist_ok=True)
    config = ConfigParser(interpolation=None)
    config["supervisord"] = {
        "pidfile": ".run/supervisord.pid",
        "logfile": ".run/logs/supervisord.log",
        "logfile_maxbytes": "10MB",
        "logfile_backups": "3",
        "childlogdir": ".run/logs",
    }
    if os.geteuid() == 0:
        config["supervisord"]["user"] = "root"  # supervisord wants it said
    # A socket that only its owner can open, and no port: whoever reaches it can run any command as this user.
    config["unix_http_server"] = {"file": str(control_socket()), "chmod": "0700"}
    config["supervisorctl"] = {"serverurl": f"unix://{control_socket()}"}
    factory = "supervisor.rpcinterface:make_main_rpcinterface"
    config["rpcinterface:supervisor"] = {"supervisor.rpcinterface_factory": factory}

    def program(name: str, version: str, **options: str) -> None:
        config[f"program:{name}"] = {
            "command": f".run/bin/{name}",
            # supervisord restarts what differs from its last configuration: this makes a change of content one.
            "environment": f'JOBSTACK_VERSION="{version}"',
            "autorestart": "true",
            # It never gives up: the next attempt comes a second later than the one before.
            "startretries": "1000000",
            "redirect_stderr": "true",
            "stdout_logfile": f".run/logs/{name}.log",
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "3",
            # The signal goes to the process alone, never to its group: a worker's children end when the worker has told
            # them, after their jobs. Only the SIGKILL after the grace period takes them all.
            "stopsignal": "TERM",
            "stopasgroup": "false",
            "killasgroup": "true",
            "stopwaitsecs": str(STOP_SECONDS),
            **options,
        }

    if stack.own_postgres:
        user = servers.prepare_postgres(DATA, stack.values["POSTGRES_PASSWORD"])
        command = shlex.join(servers.postgres_command(DATA, stack.ports["postgres"]))
        version = _hash(_script("postgres", f"exec {command}"))
        # SIGINT is its "fast" shutdown. SIGTERM would wait until the last client has gone.
        program("postgres", version, stopsignal="INT", startsecs="1", priority="10", **({"user": user} if user else {}))
    if stack.own_redis:
        (RUN / "redis").mkdir(mode=0o700, exist_ok=True)
        maxmemory = stack.values.get("REDIS_MAXMEMORY", "256mb")
        text = servers.redis_config(RUN / "redis", stack.ports["redis"], stack.values["REDIS_PASSWORD"], maxmemory)
        # In a file, because arguments can be read by everybody on this machine.
        _write(RUN / "redis.conf", text)
        command = shlex.join([str(servers.redis_server()), str(RUN / "redis.conf")])
        program("redis", _hash(text, _script("redis", f"exec {command}")), startsecs="1", priority="20")
    code = code_version()
    for name, (_, command_line) in stack.processes.items():
        exports = [
            f"export {key}={shlex.quote(value)}" for key, value in sorted(stack.process_environment(name).items())
        ]
        text = _script(name, *exports, f"cd {shlex.quote(str(ROOT))}", f"exec {shlex.join(command_line)}", mode=0o700)
        # Started by us, after the migration. 5 s: what ends sooner waits before it is tried again.
        program(name, _hash(code, text), autostart="false", startsecs="5", priority="30")
    _write(ENVIRONMENT, "".join(f"{name}={_quoted(value)}\n" for name, value in sorted(stack.environment.items())))
    config["group:app"] = {"programs": ",".join(stack.processes), "priority": "30"}
    with CONFIG.open("w", encoding="utf-8") as file:
        config.write(file)


def _quoted(value: str) -> str:
    """As python-dotenv reads it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- supervisord ----------------------------------------------------------------------------------------------------


def supervisor() -> Any:
    url = f"unix://{control_socket()}"
    return ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, url)).supervisor


def is_running() -> bool:
    try:
        return bool(supervisor().getPID())
    except (OSError, Fault):
        return False


def states() -> dict[str, dict[str, Any]]:
    return {info["name"]: info for info in supervisor().getAllProcessInfo()}


def _launch() -> None:
    _end_leftovers()
    inherited = {
        name: value
        for name, value in os.environ.items()
        # What a person sets goes through the files in .run/environment: a value that is set no more must not stay
        # behind in supervisord.
        if name not in UNWANTED and name not in environment.documented()
    }
    started = subprocess.run(
        [str(venv.PYTHON), "-m", "supervisor.supervisord", "-c", str(CONFIG)],
        check=False,
        cwd=ROOT,
        env={**inherited, "JOBSTACK_STACK": MARK},
        capture_output=True,
        text=True,
    )
    if started.returncode:
        raise Problem(f"supervisord did not start: {(started.stderr or started.stdout).strip()}")
    http.wait_for("supervisord", is_running, 10)


def _apply() -> list[str]:
    """Let supervisord run what the files say now.

    Returns:
        The groups that were started, or will have to be.
    """
    if not is_running():
        _launch()
        return [info["group"] for info in supervisor().getAllProcessInfo()]
    rpc = supervisor()
    added, changed, removed = rpc.reloadConfig()[0]
    for group in ("app", "redis", "postgres"):
        if group in changed + removed:
            say(f"Restarting {group}: its settings or its code changed ...")
            _stop_group(group)
            rpc.removeProcessGroup(group)
    for group in ("postgres", "redis", "app"):
        if group in added + changed:
            rpc.addProcessGroup(group)
    stopped = {info["group"] for info in rpc.getAllProcessInfo() if info["statename"] not in ("RUNNING", "STARTING")}
    return sorted({*added, *changed, *stopped})


def _stop_group(group: str) -> None:
    rpc = supervisor()
    rpc.stopProcessGroup(group, False)
    http.wait_for(
        f"The end of {group}",
        lambda: (
            not any(
                info["group"] == group and info["statename"] in ("RUNNING", "STARTING", "STOPPING", "BACKOFF")
                for info in rpc.getAllProcessInfo()
            )
        ),
        STOP_SECONDS + 15,
    )


def _end_leftovers() -> None:
    """End what a killed supervisord left running: it would hold the ports, and take jobs with old code."""
    left = processes()
    ids = {process.pid for process in left}
    # Parents only: a worker's children end when the worker has told them. And the servers last, since a worker that
    # hands its jobs back needs PostgreSQL for it.
    parents = [process for process in left if process.info["ppid"] not in ids]
    # Not the whole grace period: their output has no reader any more, and a worker that can't write may not get to its
    # end. What it was doing runs again when the lease is over.
    for is_server, how in ((False, signal.SIGTERM), (True, signal.SIGINT)):
        some = {process.pid: process for process in parents if (process.info["cwd"] in SERVER_FOLDERS) == is_server}
        for process in some.values():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        deadline = time.monotonic() + 10
        while some.keys() & {process.pid for process in processes()} and time.monotonic() < deadline:
            time.sleep(0.1)
    for process in processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()


# --- what the commands do -------------------------------------------------------------------------------------------


@contextmanager
def _alone() -> Iterator[None]:
    """One `make up` or `make down` at a time."""
    RUN.mkdir(mode=0o711, exist_ok=True)
    with (RUN / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another `make up` or `make down` of this clone ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def up(values: Mapping[str, str]) -> None:
    """Start what does not run, restart what changed, wait until all is healthy, run a first job.

    Raises:
        Problem: with the last log lines of what failed already printed.
    """
    with _alone():
        if not is_running():
            # In time, and before anything else: the old one's processes hold the ports that are checked next.
            _end_leftovers()
        stack = Stack(values)
        held = {environment.port(running_stack().values, name) for name in environment.PORTS} if is_running() else ()
        for name in environment.PORTS:
            if environment.port(stack.values, name) not in held and not (stack.inline and name == "FLOWER_PORT"):
                environment.need_free(stack.values, name)
        write_config(stack)
        _write(SETTINGS, json.dumps(stack.values))
        try:
            started = _apply()
            if started:
                _prepare_database(stack)
                # The signs of life of those before them must not count for these.
                shutil.rmtree(HEALTH, ignore_errors=True)
                HEALTH.mkdir()
                supervisor().startProcessGroup("app", False)
            _wait_until_healthy(stack)
            if started:
                http.smoke_job(stack.values)
        except Problem:
            explain(stack)
            raise
    if not started:
        say("Everything was running already, nothing changed.")
    say(http.summary(stack.values, flower=not stack.inline))


def _prepare_database(stack: Stack) -> None:
    if stack.own_postgres:
        _wait_for_postgres(stack)
    else:
        say("PostgreSQL: the one that DATABASE_URL names; none is started here.")
    if stack.own_redis:
        client = redis.Redis.from_url(stack.environment["REDIS_URL"], socket_timeout=2)
        _wait_for("Redis", lambda: _answers(client), 60)
    elif not stack.inline:
        say("Redis: the one that your environment names; none is started here.")
    name = next(iter(stack.processes))
    migrated = subprocess.run(
        [str(venv.PYTHON), "-m", "app.migrate"],
        check=False,
        cwd=ROOT,
        env={**os.environ, **stack.process_environment(name)},
        capture_output=True,
        text=True,
    )
    _write(LOGS / "migrate.log", migrated.stdout + migrated.stderr)
    if migrated.returncode:
        say(f"\n--- migrate (.run/logs/migrate.log) ---\n{_tail(LOGS / 'migrate.log')}")
        raise Problem("The database could not be migrated; the reason stands above.")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False  # starting, or loading its file


def _wait_for_postgres(stack: Stack) -> None:
    """Until it answers, and has the database."""
    url, reason = stack.environment["DATABASE_URL"], ""

    def answers() -> bool:
        nonlocal reason
        reason = ""
        try:
            with psycopg.connect(url, dbname="postgres", autocommit=True, connect_timeout=5) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'jobstack'").fetchone():
                    connection.execute("CREATE DATABASE jobstack")
        except psycopg.OperationalError as error:
            reason = str(error)
        return not reason or "password authentication failed" in reason

    _wait_for("PostgreSQL", answers, 60)
    if reason:
        raise Problem(
            "The database in .run was made with another POSTGRES_PASSWORD.",
            "Put the old one back into .env, or start with an empty database: make clean",
        )


def _wait_until_healthy(stack: Stack) -> None:
    # The cheap questions first: a worker's health costs a start of Python.
    names = sorted(stack.processes, key=lambda name: name not in ("api", "inline", "flower"))
    bad: list[str] = []
    with ThreadPoolExecutor() as pool:
        for some in (names[:1], names):

            def healthy(some: list[str] = some) -> bool:
                bad[:] = [f"{name}: {health}" for name, health in _healths(pool, stack, some).items() if health != "ok"]
                return not bad

            try:
                _wait_for("Health", healthy, 90)
            except Problem as problem:
                raise Problem(f"{problem} {'; '.join(bad)}", *problem.hints) from None


def _wait_for(what: str, ready: Callable[[], bool], seconds: float) -> None:
    """Like `http.wait_for`, but gives up sooner on processes that end again and again."""
    began = time.monotonic()

    def ready_or_hopeless() -> bool:
        failing = [name for name, info in states().items() if info["statename"] in ("BACKOFF", "FATAL")]
        # One failed start may be another process's fault; after 15 s it is its own.
        if failing and time.monotonic() - began > 15:
            raise Problem(f"{', '.join(failing)}: ends again right after its start.")
        return ready()

    http.wait_for(what, ready_or_hopeless, seconds)


def _healths(pool: ThreadPoolExecutor, stack: Stack, names: Iterable[str]) -> dict[str, str]:
    current = states()

    def health(name: str) -> str:
        return stack.health(name) if current[name]["statename"] in ("RUNNING", "STARTING") else "-"

    return dict(zip(names, pool.map(health, names), strict=True))


def explain(stack: Stack) -> None:
    """Print the last log lines of what was started and is not well."""
    for name, info in states().items() if is_running() else ():
        if info["statename"] != "STOPPED" and (info["statename"] != "RUNNING" or stack.health(name) != "ok"):
            say(f"\n--- {name}: {info['statename'].lower()} (.run/logs/{name}.log) ---")
            say(_tail(LOGS / f"{name}.log"))


def _tail(log: Path) -> str:
    """Its last lines; what is said over and over is said once."""
    lines = log.read_text(errors="replace").splitlines()[-200:] if log.exists() else []
    return "\n".join([line for line, _ in groupby(lines)][-20:])


def down() -> None:
    """Stop everything; what runs gets its grace period. Data stays."""
    with _alone():
        if is_running():
            say("Stopping; jobs that run may end or are handed back (up to a minute) ...")
            process = psutil.Process(supervisor().getPID())
            supervisor().shutdown()
            deadline = time.monotonic() + STOP_SECONDS + 60
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > deadline:
                    raise Problem(f"supervisord (process {process.pid}) does not end.")
                time.sleep(0.1)
        _end_leftovers()


clean = down  # the data is below .run, which the caller deletes


def ps() -> None:
    if not is_running():
        say("Nothing runs. Start it with: make up")
        return
    stack, current = running_stack(), states()
    with ThreadPoolExecutor() as pool:
        healths = _healths(pool, stack, current)
    say(f"{'PROCESS':20}{'STATE':10}{'PID':>8}  {'SINCE':20} HEALTH")
    for name, info in current.items():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info["start"])) if info["start"] else "-"
        health = healths[name].splitlines()[-1]
        say(f"{name:20}{info['statename'].lower():10}{info['pid'] or '-':>8}  {since:20} {health}")


def logs(service: str | None) -> None:
    known = sorted(path.stem for path in LOGS.glob("*.log"))
    if service and service not in known:
        raise Problem(f"There is no log of `{service}`.", f"There are: {', '.join(known) or 'none yet'}")
    os.chdir(LOGS)
    os.execvp("tail", ["tail", "-n", "100", "-F", *(f"{name}.log" for name in ([service] if service else known))])


def log_lines() -> list[tuple[str, str]]:
    """All that is kept, as (process, line), of each process the oldest first."""
    files = sorted(LOGS.glob("*.log*"), key=lambda path: path.stat().st_mtime)
    return [
        (path.name.partition(".")[0], line)
        for path in files
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    ]


def run(script: str, *arguments: str) -> int:
    """A script with the environment that the processes were started with; what is set now beats it."""
    return _python(f"scripts/{script}", *arguments)


def demo() -> int:
    return run("demo.py")


def migrate() -> int:
    return _python("-m", "app.migrate")


def _python(*arguments: str) -> int:
    variables = {**running_stack().environment, **os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(venv.PYTHON), *arguments], check=False, cwd=ROOT, env=variables).returncode


def running_stack() -> Stack:
    """The stack as the last `make up` was told to start it.

    Raises:
        Problem: when there was none yet.
    """
    if not SETTINGS.exists():
        raise Problem("The stack was not started yet.", "make up")
    return Stack(json.loads(SETTINGS.read_text()))


def processes() -> list[psutil.Process]:
    """Everything that `make up` started and that lives."""
    found = []
    for process in psutil.process_iter(["status", "ppid", "environ", "cwd"]):
        info = process.info
        # The servers write their state over the place where a process keeps its environment, but stay in their folder.
        ours = (info["environ"] or {}).get("JOBSTACK_STACK") == MARK or info["cwd"] in SERVER_FOLDERS
        if ours and info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
