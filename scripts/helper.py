"""What the scripts share: settings, servers within time limits, exit codes, and how they speak.

A script is a function of typer that begins with `script = Script(as_json)` and ends with `script.done(...)`.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import quote, unquote, urlsplit
from uuid import UUID

import psycopg
import typer
from dotenv import dotenv_values
from psycopg.rows import DictRow
from redis import Redis, RedisError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from app import logs
from app.database import CONNECTION_LOST, Database, Params
from app.jobs import messages, statements
from app.jobs.stats import WITHDRAWN, Stats
from app.queues import ALL_QUEUES
from app.settings import Settings, SettingsError, get_settings, split_redis_url, without_password

T = TypeVar("T")

# Exit codes of every script.
FINE, FOUND, COULD_NOT = 0, 1, 2

ROOT = Path(__file__).parent.parent
REDIS_VARIABLES = ("REDIS_URL", "CELERY_BROKER_URL", "BROKER_URL", "REDIS_HOST")
# Together below the 15 s in which every script must say that something cannot be reached.
CONNECT_SECONDS, ANSWER_SECONDS, REDIS_SECONDS = 5.0, 9.0, 3.0
COUNTDOWN_SECONDS = 5

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing. Exits 1 if anything.")]
Queues = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ALL_QUEUES)}.", show_default=False)]

# Whether this run prints JSON: what stops a script early must know it too.
_as_json = False


def no_facts(message: str) -> dict[str, Any]:
    return {}


# What a script's JSON says besides when it is stopped, made from the message.
stop_facts: Callable[[str], dict[str, Any]] = no_facts


def run(main: Callable[..., Any] | typer.Typer) -> NoReturn:
    """Runs a script's function and ends this process. Nobody sees a traceback: who is on call needs a sentence."""
    global _as_json
    # Before the options are read: a wrong one is to be told in JSON too.
    _as_json = "--json" in sys.argv
    if isinstance(main, typer.Typer):
        app = main
    else:
        app = commands()
        app.command()(main)
    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        stop(f"{sentence(error.format_message())} --help says what there is.")
    except (typer.Abort, EOFError, KeyboardInterrupt):
        print("\nInterrupted: nothing more is changed.", file=sys.stderr)
        code = COULD_NOT
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        stop(f"The database does not have this code's schema ({error.diag.message_primary}). Next: make migrate")
    except SettingsError as error:
        stop(f"{error} (this script needs it, although JOBS_EXECUTION=inline does not).")
    except (*CONNECTION_LOST, RedisError, ConnectionError, TimeoutError) as error:
        stop(f"A connection was lost half-way: {sentence(error)} Next: doctor.py, then the same again.")
    except Exception as error:  # noqa: BLE001 - whatever it is, one sentence and exit code 2
        stop(f"It failed in a way nobody thought of, {type(error).__name__}: {sentence(error)}")
    # Not sys.exit: a thread that hangs in a name server's silence must not keep the process.
    try:
        sys.stdout.flush()
    except OSError as error:
        _unwritten(error)
    sys.stderr.flush()
    os._exit(code or FINE)


def commands(**options: Any) -> typer.Typer:
    """A typer app without boxes and colours around its errors."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


def stop(message: str, **facts: Any) -> NoReturn:
    """The script could not do its work."""
    message = scrub(message)
    if _as_json:
        _print_json({"ok": False, "error": message, **facts, **stop_facts(message)})
    else:
        print(message, file=sys.stderr)
    raise SystemExit(COULD_NOT)


def sentence(error: BaseException | str) -> str:
    """What an error says, in one line without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return scrub(text if text.endswith((".", "!", "?")) else f"{text}.")


def scrub(text: str) -> str:
    """The text without any password that this process knows: drivers quote URLs, rows keep what drivers said."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        place = re.escape(secret)
        if re.fullmatch("[A-Za-z]+|.{1,5}", secret):
            # A word such as `redis` is a bad password and in half of our sentences: hidden where passwords stand.
            place = rf"(?<=[:=@]){place}(?=[@&:'\"\s]|$)|(?<=[/'\"]){place}(?=@)"
        text = re.sub(place, "***", text)
    return text


def _secrets() -> set[str]:
    """The passwords in the environment, in each way of writing in which they may turn up."""
    found = set()
    for name, value in os.environ.items():
        if re.search("PASSWORD|SECRET|TOKEN", name):
            found.add(value)
        elif name.endswith("AUTH"):
            found |= {value, value.partition(":")[2]}
        elif name == "API_KEYS":
            found |= {entry.partition(":")[2].strip() for entry in value.split(",")}
        elif "://" in value:
            # Not by urlsplit, which refuses the very URLs that end up in error messages. A raw password may hold `?`.
            scheme, _, rest = value.partition("://")
            for part in (rest, rest.partition("?")[0]):
                user, colon, password = part.rpartition("@")[0].partition(":")
                if not colon and scheme.startswith("redis"):
                    # Redis needs no user's name: whoever forgets the colon has the password in its place.
                    password = user
                # Written raw, it is cut in pieces by drivers, which then take one for the host, another for the port.
                found |= {password, *(piece for piece in re.split("[@/?#:]", password) if len(piece) >= 3)}
            found |= set(re.findall(r"[?&][^=&]*(?:pass|secret|token|auth)[^=&]*=([^&#]*)", value, re.IGNORECASE))
    found |= {unquote(secret) for secret in found}
    found |= {form for secret in found for form in (quote(secret, ""), repr(secret)[1:-1], json.dumps(secret)[1:-1])}
    return found - {""}


def scrubbed(value: Any) -> Any:
    """The same for what becomes JSON, before it does: afterwards a password with a quote would be written differently,
    and taking it out might break the JSON. Names of fields stay."""
    if isinstance(value, dict):
        return {name: scrubbed(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [scrubbed(entry) for entry in value]
    return value if value is None or isinstance(value, int | float) else scrub(str(value))


def _print_json(facts: dict[str, Any]) -> None:
    try:
        print(json.dumps(scrubbed(facts)), flush=True)
    except OSError as error:
        _unwritten(error)


def _unwritten(error: OSError) -> NoReturn:
    """A full disk, or a pipe that nobody reads. Ends at once: Python's own end would try again, and fail with 120."""
    print(f"The answer could not be written: {sentence(error)}", file=sys.stderr, flush=True)
    os._exit(COULD_NOT)


def load_environment() -> None:
    """Takes what the environment does not say from the files of `make up`.

    In containers compose has set the environment; natively `make up` keeps what it gave its processes in `.run/env`.
    """
    # One family: a REDIS_URL in the environment must not lose against another spelling in a file.
    has_redis = any(os.environ.get(name) for name in REDIS_VARIABLES)
    for file in (".run/env", ".env"):
        for name, value in dotenv_values(ROOT / file).items():
            if value and not os.environ.get(name) and not (has_redis and name in REDIS_VARIABLES):
                os.environ[name] = value


def settings_or_exit() -> Settings:
    """The settings, as the stack's processes have them. The environment beats the files."""
    load_environment()
    # What a script has to say goes to its reader; of the log only trouble.
    os.environ.setdefault("LOG_LEVEL", "WARNING")
    try:
        settings = get_settings()
        # Read late, by their drivers: a URL that cannot be read is a wrong setting too.
        urls = [settings.database_conninfo]
        if settings.jobs_execution == "celery":  # the other needs no Redis
            urls += [settings.broker_url, settings.result_backend_url]
        for url in urls:
            _ = urlsplit(url).port
    except SystemExit as error:
        stop(str(error).replace("cannot start", "cannot be reached from here"))
    except ValueError:
        # Not with what urllib says: it quotes the piece of a raw password that it took for a port.
        stop(
            "A URL in the environment cannot be read. Look at DATABASE_URL and REDIS_URL: in a password, "
            "@ / ? # : must be written as %40 %2F %3F %23 %3A."
        )
    logs.configure(sys.stderr)
    return settings


def begin(call: Callable[[], T]) -> "Future[T]":
    """Starts the call in a thread that nobody waits for at the end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result.

    Raises:
        TimeoutError: it took longer; it goes on in its thread. Name servers, for one, have no time limit of their own.
    """
    future = begin(call)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


class Unreachable(Exception):
    """A server that does not answer, or does not let us in. `fix` says what to do."""

    def __init__(self, what: str, variable: str) -> None:
        super().__init__(what)
        self.fix = f"is it running (make ps), and do {variable}'s host, port and password fit?"
        if "too many clients" in what or "connection slots" in what:
            self.fix = "its connections are used up: docs/runbooks/database-connections-gone.md"


class Report:
    """What a script says, in words or as JSON."""

    def __init__(self, as_json: bool = False) -> None:
        global _as_json
        _as_json = as_json
        self.as_json = as_json
        # Lines are as long as they are: a report is grepped and pasted.
        self._console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

    def say(self, text: str = "", style: str = "") -> None:
        """A line for people; nothing where JSON was asked for."""
        if not self.as_json:
            self._console.print(Text(scrub(text), style=style))

    def next(self, text: str) -> None:
        """What to do now."""
        self.say(f"Next: {text}", "bold")

    def table(self, columns: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> None:
        """Rows are (cells, style)."""
        table = Table(*columns, box=None, pad_edge=False)
        for cells, style in rows:
            table.add_row(*(Text(scrub(cell)) for cell in cells), style=style)
        if not self.as_json:
            self._console.print(table, soft_wrap=False)

    def done(self, code: int = FINE, **facts: Any) -> NoReturn:
        """Ends the script."""
        self.print_json(code, **facts)
        raise typer.Exit(code)

    def print_json(self, code: int, **facts: Any) -> None:
        """Where it was asked for. `ok` is true where the exit code is 0."""
        if self.as_json:
            _print_json({"ok": code == FINE, **facts})

    def confirm(self, what: str, yes: bool) -> None:
        """Asks before something is deleted, and counts down, so that a hasty yes can be taken back.

        Raises:
            SystemExit: with 2, if nobody can be asked or the answer is no.
        """
        if yes:
            return
        if self.as_json or not sys.stdin.isatty():
            stop(f"{what} Nobody can be asked here: say --yes to do it, or --dry-run to see what it would do.")
        self.say(what, "yellow")
        if input("Type yes to go on: ").strip().lower() != "yes":
            stop("Nothing was changed.")
        for left in range(COUNTDOWN_SECONDS, 0, -1):
            print(f"\rIn {left} s; Ctrl-C stops it. ", end="", flush=True)
            time.sleep(1)
        print()


class Script(Report):
    """One run of a script: its settings, its servers, opened at first use, and what it says."""

    def __init__(self, as_json: bool = False) -> None:
        super().__init__(as_json)
        self.settings = settings_or_exit()

    def audit(self, action: str) -> None:
        """A line on stderr, for what somebody should be able to ask about later."""
        logs.get("audit").warning("audit", action=action, by=f"{os.environ.get('USER', os.getuid())}@{gethostname()}")

    def confirm(self, what: str, yes: bool) -> None:
        super().confirm(what, yes)
        self.audit(what)

    @cached_property
    def database(self) -> Database:
        return self._or_stop(self.open_database)

    def sql(self, statement: str, params: Params | None = None) -> list[DictRow]:
        """One statement's rows. A server that froze half-way is noticed too."""
        database = self.database
        return within(ANSWER_SECONDS + 1, lambda: database.run(statement, params))

    def cancel(self, *job_ids: UUID) -> None:
        """As the API does it; one that is over stays as it is."""
        counted = Stats("scripts")
        for job_id in job_ids:
            for row in self.sql(statements.CANCEL, {"id": job_id}):
                if row["status"] == "cancelled":
                    counted.count(row["queue"], row["kind"], WITHDRAWN)
        counted.flush(self.database)

    @cached_property
    def redis(self) -> Redis:
        return self._or_stop(self.open_redis)

    @cached_property
    def results(self) -> Redis:
        """The Redis with Celery's results, mostly the same."""
        if self.settings.result_backend_url == self.settings.broker_url:
            return self.redis
        there = self.settings.model_copy(update={"celery_broker_url": self.settings.celery_result_backend})
        return self._or_stop(lambda: self.open_redis("Redis for results", there))

    def open_database(self) -> Database:
        """Raises Unreachable."""
        database = Database(self.settings, "script", statement_seconds=ANSWER_SECONDS)
        try:
            within(CONNECT_SECONDS, lambda: database.run("SELECT 1"))
        except Exception as error:  # noqa: BLE001 - also what a driver says of a URL it can't read
            where = without_password(self.settings.database_conninfo)
            raise Unreachable(f"PostgreSQL cannot be reached at {where}: {sentence(error)}", "DATABASE_URL") from None
        return database

    def open_redis(self, name: str = "Redis", settings: Settings | None = None) -> Redis:
        """Raises Unreachable."""
        settings = settings or self.settings
        try:
            client = messages.connect(settings, seconds=REDIS_SECONDS)
            within(CONNECT_SECONDS, client.ping)
        except Exception as error:  # noqa: BLE001 - also what a driver says of a URL it can't read
            where = without_password(split_redis_url(settings.broker_url)[0])
            raise Unreachable(f"{name} cannot be reached at {where}: {sentence(error)}", "REDIS_URL") from None
        return client

    @staticmethod
    def _or_stop(open_it: Callable[[], T]) -> T:
        try:
            return open_it()
        except Unreachable as error:
            stop(f"{error} Next: {error.fix}")

    @cached_property
    def celery(self) -> Any:
        from app.celery_app import celery_app

        for options in ("broker_transport_options", "result_backend_transport_options"):
            if "global_keyprefix" in celery_app.conf[options]:
                stop(
                    f"app/celery_app.py sets global_keyprefix in {options}. Our own messages are written without one, "
                    "so workers would look elsewhere. Take it out: a Redis that is shared is shared by its number (/1)."
                )
        return celery_app

    def queues(self, asked: list[str] | None, default: tuple[str, ...] = ALL_QUEUES) -> list[str]:
        """The queues that were named, or all."""
        unknown = [name for name in asked or () if name not in ALL_QUEUES]
        if unknown:
            stop(f"There is no queue {unknown[0]!r}; there are: {', '.join(ALL_QUEUES)}.")
        return list(dict.fromkeys(asked or default))


def age(seconds: float | None) -> str:
    """Seconds in words: 0.4 s, 12 s, 3 min, 5 h, 2 days."""
    if seconds is None:
        return "never"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes in words: 512 B, 3.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def count(number: int, what: str) -> str:
    """1 message, 2 messages."""
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith(('s', 'y')) else 's'}"
