"""Everything at a glance: what is fine, what is not, and the command that helps. Fit to paste into a bug report.

python scripts/doctor.py
python scripts/doctor.py --watch
"""

import asyncio
import os
import re
import shutil
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from zoneinfo import ZoneInfo

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg
import typer

from app.celery_app import visibility_timeout
from app.database import SCHEMA_REVISION
from app.files.store import FileStore
from app.jobs import statements
from app.jobs.messages import RUN_SHORT_JOBS
from app.queues import ALL_QUEUES, JOB_QUEUES
from app.settings import split_redis_url, without_password
from scripts import cleanup_redis_manual, debug_beat_service, helper, looks
from scripts.broker import Broker, Worker
from scripts.helper import FINE, FOUND, ROOT, AsJson, Script, Unreachable, age, begin, count, sentence, size, within

CHECK_SECONDS = 8.0
# For all checks together, whoever is silent: with Python's start below the 15 s of every script.
ROUND_SECONDS = 12.5
WATCH_SECONDS = 5.0
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}
# Older than this, the oldest due job of a queue is worth a look.
OLDEST_SECONDS = 300
# A message may be on its way, or with a worker that is about to claim it.
SETTLE_SECONDS = 15
# Above it nobody looks at each message of a queue: that takes kilobytes and time for each.
MANY_MESSAGES = 50_000
DAY = 86400
OLDEST_REDIS = (6, 2)


class Finding(NamedTuple):
    """One line. `level`: ok, warning or problem."""

    check: str
    level: str
    message: str
    fix: str = ""


def main(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help=f"Again every {WATCH_SECONDS:g} s, until Ctrl-C.")] = False,
) -> None:
    """Exits 0: no problem; there may be warnings. 1: there are problems. 2: the settings are missing or wrong."""
    helper.stop_facts = lambda message: {
        "findings": [Finding("settings", "problem", message, "see .env.example")._asdict()]
    }
    while True:  # with connections of its own each time, since servers come and go
        script = Script(as_json)
        if script.settings.jobs_execution == "celery":
            _ = script.celery  # may be configured so that nothing fits
        findings = list(Doctor(script).findings())
        code = FOUND if any(finding.level == "problem" for finding in findings) else FINE
        if watch and not as_json:
            sys.stdout.write("\033[2J\033[H" if sys.stdout.isatty() else "\n")
        tell(script, findings)
        facts = {"findings": [finding._asdict() for finding in findings]}
        if not watch:
            script.done(code, **facts)
        script.print_json(code, **facts)
        time.sleep(WATCH_SECONDS)


def tell(script: Script, findings: list[Finding]) -> None:
    settings = script.settings
    script.say(f"jobstack doctor, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, APP_ENV={settings.app_env}", "bold")
    for finding in findings:
        script.say(f"{finding.level:<8} {finding.check:<13} {finding.message}", STYLES[finding.level])
        if finding.fix:
            script.say(f"{'':<22} -> {finding.fix}")
    counted = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    script.say(f"{count(counted['problem'], 'problem')}, {count(counted['warning'], 'warning')}.", "bold")


class Doctor:
    """One round. A check yields findings; what it needs and cannot have is a finding of another."""

    def __init__(self, script: Script) -> None:
        self.script, self.settings = script, script.settings
        # Without Redis, workers and beat: they may be there, but not for this stack.
        self.inline = script.settings.jobs_execution == "inline"

    def findings(self) -> Iterator[Finding]:
        # Side by side: each may take its whole time to find out that nobody answers.
        self._until = time.monotonic() + ROUND_SECONDS
        storage, certificates = begin(lambda: list(self.storage())), begin(lambda: list(self.certificates()))
        opening: dict[str, Future[Any]] = {"postgres": begin(self.script.open_database)}
        away = {"redis"} if self.inline else set()
        if not self.inline:
            opening["redis"] = begin(self.script.open_redis)
        yield from self._run("settings", self.rules)
        for name, future in opening.items():
            try:
                opened = future.result(CHECK_SECONDS)
            except Unreachable as error:
                away.add(name)
                yield Finding(name, "problem", str(error), error.fix)
            else:
                setattr(self.script, "database" if name == "postgres" else "redis", opened)
        checks: dict[str, tuple[set[str], Callable[[], Iterable[Finding]]]] = {
            "postgres": ({"postgres"}, self.postgres),
            "migrations": ({"postgres"}, self.migrations),
            "redis": ({"redis"}, self.redis),
            "keys": ({"redis"}, self.keys),
            "versions": (set(), self.versions),
            "clocks": ({"postgres", "redis"}, self.clocks),
            "queues": ({"postgres", "redis"}, self.queues),
            "workers": ({"redis"}, self.workers),
            "leases": ({"postgres"}, self.leases),
            "drift": ({"postgres", "redis"}, self.drift),
            "unacked": ({"redis"}, self.unacked),
            "beat": ({"postgres", "redis"}, self.beat),
            "storage": (set(), storage.result),
            "certificates": (set(), certificates.result),
        }
        for name, (needs, check) in checks.items():
            if not needs & away:
                yield from self._run(name, check)

    def _run(self, name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
        # When time is over, what asks nobody still gets its moment.
        seconds = min(CHECK_SECONDS, max(self._until - time.monotonic(), 0.1))
        try:
            yield from within(seconds, lambda: list(check()))
        except psycopg.errors.UndefinedTable:
            yield Finding(name, "problem", "its table is not there.", "make migrate")
        except Exception as error:  # noqa: BLE001 - one check that fails must not hide the others
            yield Finding(name, "problem", f"could not be looked at: {sentence(error)}", "look again; make logs")

    @cached_property
    def broker(self) -> Broker:
        return Broker(self.script.redis, self.script.celery, results=self.script.redis)

    @cached_property
    def answering(self) -> dict[str, Worker]:
        return self.broker.workers()

    # --- the checks ---

    def rules(self) -> Iterator[Finding]:
        s = self.settings
        limits = f"limits {s.job_soft_time_limit} < {s.job_time_limit} < visibility {visibility_timeout(s)} s"
        yield Finding(
            "settings", "ok", f"heartbeat {s.job_heartbeat_seconds:g} s, lease {s.job_lease_seconds:g} s, {limits}"
        )
        if self.inline:
            text = "JOBS_EXECUTION=inline: the API runs the jobs; Redis, workers and beat are not looked at"
            yield Finding("settings", "ok", text)
        try:
            ZoneInfo(s.schedule_timezone)
        except (KeyError, ValueError, OSError):
            yield Finding(
                "settings", "problem", "SCHEDULE_TIMEZONE is no time zone: beat does not start.", "UTC, Europe/Berlin"
            )
        if s.app_env == "production" and not s.api_keys:
            yield Finding(
                "settings", "problem", "API_KEYS is empty in production: the API does not start.", ".env.example"
            )
        if s.webhook_allow_private and s.app_env == "production":
            hint = "WEBHOOK_ALLOW_PRIVATE=false"
            yield Finding("settings", "warning", "webhook may call private addresses of your network.", hint)

    def versions(self) -> Iterator[Finding]:
        packages = {name: version(name) for name in ("celery", "kombu", "redis", "psycopg")}
        said = ", ".join(f"{name} {number}" for name, number in packages.items())
        yield Finding("versions", "ok", f"Python {sys.version.split()[0]}, {said}")
        pins = ROOT / "requirements" / "celery.in"
        tested = dict(re.findall(r"^(\w+)==(\S+)$", pins.read_text(), re.MULTILINE)) if pins.exists() else {}
        for name, number in tested.items():
            if packages[name] != number:
                text = f"{name} {packages[name]} is not the tested {number}."
                yield Finding("versions", "warning", text, "docs/celery.md says why; make dev installs the lock")

    def postgres(self) -> Iterator[Finding]:
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            self.script.sql("SELECT 1")
            seconds.append(time.monotonic() - began)
        [row] = self.script.sql(looks.SERVER)
        took = statistics.median(seconds) * 1000
        where = without_password(self.settings.database_conninfo)
        text = f"{row['version']} at {where}, {took:.1f} ms, up {age(row['uptime'])}, {size(row['bytes'])}, "
        text += f"{row['connections']} of {row['max_connections']} connections{', TLS' if row['tls'] else ''}"
        yield Finding(
            "postgres", "ok" if took < 50 else "warning", text, "" if took < 50 else "it is slow: load, network?"
        )
        for name in ("fsync", "full_page_writes", "synchronous_commit"):
            if row[name] == "off":
                text = f"{name} is off: an accepted job may be lost in a power cut."
                level = "problem" if self.settings.app_env == "production" else "warning"
                yield Finding("postgres", level, text, f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()")
        if row["read_only"]:
            yield Finding("postgres", "problem", "it is a read-only replica.", "let DATABASE_URL name the primary")
        if row["connections"] > 0.8 * row["max_connections"]:
            names = {r["application_name"]: r["connections"] for r in self.script.sql(looks.CONNECTIONS, {})}
            text = f"connections are nearly used up: {names}"
            yield Finding("postgres", "warning", text, "fewer processes, or more max_connections")
        if row["forgotten"]:
            text = f"{count(row['forgotten'], 'transaction')} idle for over a minute: vacuum can't tidy up."
            yield Finding("postgres", "warning", text, "end it: pg_terminate_backend(pid) of pg_stat_activity")

    def migrations(self) -> Iterator[Finding]:
        try:
            [row] = self.script.sql(looks.REVISION)
        except psycopg.errors.UndefinedTable:
            row = {"revision": None}
        revision = row["revision"] or "nothing"
        if row["revision"] is not None and revision >= SCHEMA_REVISION:
            yield Finding("migrations", "ok", f"at {revision}")
        else:
            yield Finding("migrations", "problem", f"at {revision}, this code needs {SCHEMA_REVISION}.", "make migrate")

    def redis(self) -> Iterator[Finding]:
        began = time.monotonic()
        self.script.redis.ping()
        took = (time.monotonic() - began) * 1000
        info: Any = self.script.redis.info()
        used, most, policy = info["used_memory"], info["maxmemory"], info["maxmemory_policy"]
        where = without_password(split_redis_url(self.settings.broker_url)[0])
        text = f"{info['redis_version']} at {where}, {took:.1f} ms, up {age(info['uptime_in_seconds'])}, {size(used)}"
        yield Finding("redis", "ok", f"{text} of {size(most) if most else 'no limit'}, {policy}")
        if tuple(map(int, info["redis_version"].split(".")[:2])) < OLDEST_REDIS:
            yield Finding("redis", "problem", f"{info['redis_version']} is older than 6.2.", "a newer server")
        if policy != "noeviction":
            text = f"maxmemory-policy is {policy}: a full Redis drops messages that wait."
            yield Finding("redis", "problem" if most else "warning", text, "CONFIG SET maxmemory-policy noeviction")
        if most and used > 0.8 * most:
            level = "problem" if used > 0.95 * most else "warning"
            yield Finding(
                "redis", level, f"{100 * used / most:.0f} % of its memory is used.", "cleanup_redis_manual.py"
            )
        if info.get("evicted_keys"):
            yield Finding(
                "redis", "warning", f"{info['evicted_keys']} keys were evicted.", "noeviction; rebuild_queue.py"
            )
        if not info["aof_enabled"] and not self.script.redis.config_get("save").get("save"):  # type: ignore[union-attr]
            text = "nothing is kept on disk: a restart costs the time to rebuild the queues, and other people's tasks."
            yield Finding("redis", "warning", text, "appendonly yes")
        if "err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")):
            yield Finding("redis", "problem", "it cannot write to its disk.", "free space there, then make logs")

    def keys(self) -> Iterator[Finding]:
        kinds, immortal = cleanup_redis_manual.survey(self.broker, seconds=3)
        said = ", ".join(f"{kind.keys:,} {name}" for name, kind in sorted(kinds.items())) or "none"
        total: Any = self.script.redis.dbsize()
        if total > 1.1 * sum(kind.keys for kind in kinds.values()):
            said += f": a sample of {total:,}"
        if immortal:
            text = f"{count(len(immortal), 'result')} without a time to live ({said})."
            yield Finding("keys", "warning", text, "cleanup_redis_manual.py")
        else:
            yield Finding("keys", "ok", f"{said}; each result expires")

    def clocks(self) -> Iterator[Finding]:
        [row] = self.script.sql(looks.SERVER)
        here, (seconds, micros) = time.time(), self.script.redis.time()  # type: ignore[misc]
        apart = max(abs(row["clock"] - here), abs(seconds + micros / 1e6 - here))
        fix = "" if apart < 5 else "switch on time synchronisation (NTP)"
        text = f"PostgreSQL's, Redis's and this machine's differ by at most {apart:.1f} s"
        yield Finding("clocks", "warning" if fix else "ok", text, fix)

    def queues(self) -> Iterator[Finding]:
        depths = self.broker.depths(ALL_QUEUES)
        for row in self.script.sql(looks.QUEUED, {"queues": list(ALL_QUEUES)}):
            name = row["queue"]
            who = [worker.name for worker in self.answering.values() if name in worker.queues]
            text = f"{name}: {count(depths[name], 'message')}"
            if name in JOB_QUEUES:
                due = row["published"] + row["outside"] + row["short"]
                text += f", {due} jobs due and {row['later']} later, {row['running']} running"
            if row["oldest_seconds"] is not None:
                text += f", the oldest waits {age(row['oldest_seconds'])}"
            if not who:
                yield Finding("queues", "problem", f"{text}; no worker that answers consumes it.", _start(name))
            elif (row["oldest_seconds"] or 0) > OLDEST_SECONDS:
                yield Finding(
                    "queues",
                    "warning",
                    f"{text}; {count(len(who), 'worker')}",
                    "more workers, or higher WORKER_CONCURRENCY",
                )
            else:
                yield Finding("queues", "ok", f"{text}; consumed by {', '.join(who)}")
            if name in JOB_QUEUES and depths[name] > row["published"] + 100:
                text = f"{name}: {depths[name] - row['published']} more messages than jobs."
                yield Finding("queues", "warning", text, f"purge_celery_duplicates.py {name}")

    def workers(self) -> Iterator[Finding]:
        if not self.answering:
            yield Finding("workers", "problem", "none answers.", "make ps, make logs SERVICE=worker")
        for worker in self.answering.values():
            doing = [f"{r['name']} {r['id'][:36]} for {age(time.time() - r['time_start'])}" for r in worker.active]
            text = f"{worker.name} ({', '.join(worker.queues)}): {'; '.join(doing) or 'idle'}"
            more = f"; {len(worker.reserved)} reserved, {len(worker.scheduled)} scheduled"
            yield Finding("workers", "ok", text + (more if worker.reserved or worker.scheduled else ""))

    def leases(self) -> Iterator[Finding]:
        rows = self.script.sql(looks.EXPIRED, {"patience": SETTLE_SECONDS})
        if not rows:
            yield Finding("leases", "ok", "none has run out")
            return
        first = f"{rows[0]['id']} for {age(rows[0]['expired_age'])}"
        text = f"{count(len(rows), 'job')} of dead workers not rescued yet: {first}."
        yield Finding(
            "leases", "problem", text, "debug_beat_service.py; trigger_cleanup_manual.py cleanup_orphaned_jobs"
        )

    def drift(self) -> Iterator[Finding]:
        depths = self.broker.depths(JOB_QUEUES)
        full = [queue for queue in JOB_QUEUES if depths[queue] > MANY_MESSAGES]
        for queue in full:
            text = f"{queue}: too many messages ({depths[queue]:,}) to look for jobs without one."
            yield Finding("drift", "warning", text, f"purge_celery_duplicates.py {queue}")
        looked_at = [queue for queue in JOB_QUEUES if queue not in full]
        lost = self._lost(looked_at)
        if any(lost.values()):
            time.sleep(2)  # a worker may just have taken one, and not have claimed it yet
            again = self._lost(looked_at)
            lost = {queue: ids & again.get(queue, set()) for queue, ids in lost.items()}
        total = sum(map(len, lost.values()))
        # Short jobs have no message each, but somebody must look for them.
        asleep = [
            f"{count(row['short'], 'short job')} of {row['queue']}"
            for row in self.script.sql(looks.QUEUED, {"queues": list(JOB_QUEUES)})
            if (row["oldest_short_seconds"] or 0) > SETTLE_SECONDS and not self._is_woken(row["queue"])
        ]
        if asleep:
            text = f"{', '.join(asleep)} wait, and nothing wakes a worker up for them."
            yield Finding("drift", "warning", text, "rebuild_queue.py now; debug_beat_service.py says why")
        if total:
            names = ", ".join(queue for queue, ids in lost.items() if ids)
            text = f"{count(total, 'job')} of {names} should have a message and have none; repair sends it in a minute."
            yield Finding("drift", "warning", text, "rebuild_queue.py now; if it comes again: debug_beat_service.py")
        elif not asleep and not full:
            yield Finding("drift", "ok", f"every job whose message was sent over {SETTLE_SECONDS} s ago has one")

    def _is_woken(self, queue: str) -> bool:
        runs = any(
            r["name"] == RUN_SHORT_JOBS and queue in r["args"] for w in self.answering.values() for r in w.active
        )
        return runs or self.broker.has_wake_up(queue)

    def _lost(self, queues: list[str]) -> dict[str, set[Any]]:
        rows = self.script.sql(statements.SETTLED, {"queues": queues, "settle": SETTLE_SECONDS})
        return {
            row["queue"]: set(row["ids"]) - {message.job_id for message in self.broker.waiting(row["queue"])}
            for row in rows
        }

    def unacked(self) -> Iterator[Finding]:
        held = list(self.broker.held())
        known = {r["id"] for w in self.answering.values() for r in (*w.active, *w.reserved, *w.scheduled)}
        dead = [one for one in held if one.message.id not in known and time.time() - one.since > 60]
        if dead:
            text = f"{count(len(dead), 'message')} of workers that do not answer, out of {len(held)}; they do no harm."
            yield Finding(
                "unacked", "warning", text, "cleanup_redis_manual.py; stop_retries.py --all-retries --dry-run"
            )
        else:
            yield Finding("unacked", "ok", f"{count(len(held), 'message')} of tasks that are no jobs with workers")

    def beat(self) -> Iterator[Finding]:
        seen = debug_beat_service.look(self.script)
        diagnosis = debug_beat_service.diagnose(seen)
        fine = diagnosis.code == FINE
        ticks = [
            f"{entry.task} {age(tick['sent_age'])} ago"
            for entry, tick, _ in seen.entries
            if tick["sent_age"] is not None
        ]
        text = f"ticks: {', '.join(ticks)}" if fine else f"{diagnosis.what}. {diagnosis.text}"
        yield Finding(
            "beat", "ok" if fine else "problem", text, "" if fine else f"debug_beat_service.py; {diagnosis.fix}"
        )

    def storage(self) -> Iterator[Finding]:
        url = urlsplit(self.settings.storage_url)
        where = without_password(self.settings.storage_url)
        # Whoever opens it makes the folder: of a path with a typo it would be said that it answers.
        if url.scheme == "file" and not Path(unquote(url.path)).is_dir():
            yield Finding("storage", "problem", f"{where} is no folder that is there.", "STORAGE_URL; mkdir, mount?")
            return
        try:
            within(5, lambda: asyncio.run(FileStore(self.settings).check()))
        except Exception as error:  # noqa: BLE001 - whatever the storage's library raises
            fix = "STORAGE_URL, AWS_*; is the folder there and writable?"
            yield Finding("storage", "problem", f"{where} cannot be used: {sentence(error)}", fix)
        else:
            yield Finding("storage", "ok", f"{where} answers")
        if url.scheme == "file":
            disk = shutil.disk_usage(unquote(url.path))
            free = disk.free / disk.total
            level = "problem" if free < 0.02 else "warning" if free < 0.1 else "ok"
            fix = (
                ""
                if level == "ok"
                else "trigger_cleanup_manual.py cleanup_old_files; FILE_RETENTION_DAYS; a larger disk"
            )
            yield Finding("disk", level, f"{size(disk.free)} of {size(disk.total)} free where files are", fix)

    def certificates(self) -> Iterator[Finding]:
        urls = {}
        if not self.inline:
            urls = {"Redis": self.settings.broker_url, "Redis for results": self.settings.result_backend_url}
        for name, url in urls.items():
            parts = urlsplit(url)
            if parts.scheme != "rediss" or (name != "Redis" and url == self.settings.broker_url):
                continue
            _, options = split_redis_url(url)
            if options["ssl_cert_reqs"] == "none":
                text = f"{name}: ssl_cert_reqs=CERT_NONE, so anybody in between can read and write."
                yield Finding(
                    "certificates", "warning", text, "take ssl_cert_reqs out of the URL; ssl_ca_certs=FILE for your own"
                )
                continue
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            yield from _certificate(name, str(parts.hostname), parts.port or 6379, context)
        database = urlsplit(self.settings.database_conninfo)
        mode = parse_qs(database.query).get("sslmode", [os.environ.get("PGSSLMODE", "prefer")])[0]
        local = database.hostname in ("localhost", "127.0.0.1", "::1", "postgres", None)
        if not local and mode not in ("verify-full", "verify-ca"):
            text = f"PostgreSQL's certificate is not verified (sslmode={mode})."
            fix = "add ?sslmode=verify-full to DATABASE_URL, unless the network is private"
            yield Finding("certificates", "ok", text, fix)


def _certificate(name: str, host: str, port: int, context: ssl.SSLContext) -> Iterator[Finding]:
    try:
        with socket.create_connection((host, port), 4) as raw, context.wrap_socket(raw, server_hostname=host) as tls:
            ends: Any = (tls.getpeercert() or {}).get("notAfter")
    except (ssl.SSLError, ValueError) as error:
        fix = "renew it, or ssl_ca_certs=FILE in its URL"
        yield Finding("certificates", "problem", f"{name}: {sentence(error)}", fix)
        return
    except OSError as error:
        if name != "Redis":  # of which another check says that it is away
            fix = "is it running, and do CELERY_RESULT_BACKEND's host and port fit?"
            yield Finding("certificates", "problem", f"{name}: {sentence(error)}", fix)
        return
    left = ssl.cert_time_to_seconds(ends) - time.time()
    level = "ok" if left > 21 * DAY else "warning" if left > 3 * DAY else "problem"
    yield Finding("certificates", level, f"{name}: {age(left)} left", "" if level == "ok" else "renew it")


def _start(queue: str) -> str:
    service = "worker" if queue in JOB_QUEUES else "worker-maintenance"
    return f"make ps, make logs SERVICE={service}, or start_celery_worker.sh {queue}"


if __name__ == "__main__":
    helper.run(main)
