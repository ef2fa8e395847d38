"""Beat's work: looks what is due, and sends it to the maintenance worker."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo

import psycopg

from app import logs, ticks
from app.database import Database
from app.jobs import messages
from app.queues import MAINTENANCE
from app.schedule import SCHEDULE, Entry
from app.settings import Settings, SettingsError

log = logs.get(__name__)

LONGEST_WAIT = timedelta(seconds=2)
# While a tick is under way and the next one is due already.
SHORT_WAIT = timedelta(seconds=0.5)


class Beat:
    """Any number of these may work at once, in one process or many: PostgreSQL decides who sends a tick."""

    def __init__(self, settings: Settings, schedule: Sequence[Entry] = SCHEDULE) -> None:
        self._schedule = {entry.task: entry for entry in schedule}
        try:
            self._zone = ZoneInfo(settings.schedule_timezone)
        except (KeyError, ValueError, OSError):  # unknown; no name at all; a folder of names
            raise SettingsError("jobstack: SCHEDULE_TIMEZONE must be a name such as UTC or Europe/Berlin") from None
        self._database = Database(settings, "beat", statement_seconds=5)
        self._client = messages.connect(settings)

    def round(self) -> float:
        """Sends what is due and returns the seconds until the next round.

        Raises:
            psycopg.Error, redis.RedisError: one of the two is away; the next round does the work of this one.
        """
        rows = self._database.run(
            ticks.LOOK,
            {"entries": list(self._schedule), "expires": [entry.expires for entry in self._schedule.values()]},
        )
        wait, wanted = LONGEST_WAIT, []
        for row in rows:
            entry = self._schedule[row["entry"]]
            due_at = entry.latest(row["now"], self._zone)
            if tick := _to_send(entry, row, due_at):
                wanted.append((entry, tick))
            elif entry.frequent and row["under_way"] and due_at > row["due_at"]:
                wait = min(wait, SHORT_WAIT)
            if isinstance(entry.when, timedelta):
                wait = min(wait, due_at + entry.when - row["now"])
        # Before anything is written: while Redis is away no tick must count as sent.
        if wanted and self._is_room():
            for entry, tick in wanted:
                self._send(entry, tick)
        return wait.total_seconds()

    def _is_room(self) -> bool:
        waiting = cast(int, self._client.llen(MAINTENANCE))
        if waiting >= messages.MOST_MAINTENANCE:
            log.warning("ticks_skipped", waiting=waiting, hint="is worker-maintenance running?")
        return waiting < messages.MOST_MAINTENANCE

    def _send(self, entry: Entry, due_at: datetime) -> None:
        tick: dict[str, Any] = {"entry": entry.task, "due_at": due_at}
        if not self._database.run(ticks.FIRE, tick | {"expires": entry.expires, "one_row": entry.frequent}):
            return  # another beat was first
        try:
            self._client.lpush(MAINTENANCE, messages.maintenance_message(entry.task, due_at.isoformat()))
        except messages.REDIS_ERRORS:
            try:
                self._database.run(ticks.SEND_AGAIN, tick)
            except psycopg.Error as error:
                log.warning("tick_counts_as_sent", task=entry.task, error=str(error).strip())  # until it expires
            raise


def _to_send(entry: Entry, newest: dict[str, Any], due_at: datetime) -> datetime | None:
    """The tick to send now, if any. Missed ones are not made up for: only the latest is ever sent."""
    if newest["due_at"] is None:
        return due_at
    is_next = due_at > newest["due_at"]
    if newest["finished"]:
        return due_at if is_next else None
    if newest["under_way"] and (entry.frequent or not is_next):
        return None
    # The same again, and not the next one, until it is started: a slow worker would only ever see replaced ticks.
    return due_at if is_next and (newest["started"] or not entry.frequent) else newest["due_at"]
