"""Deletes files that no job needs after FILE_RETENTION_DAYS, and what is left of uploads that broke off.

The row goes first, then the bytes: a crash in between leaves bytes without a row, which the next run finds. An upload
writes its bytes before its row, so both count as orphans only after 24 hours. Bytes do only if a newer file has had its
row for as long: a table that was emptied, or restored from an old backup, must not cost the files as well.
"""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import redis
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from app import logs
from app.database import Database
from app.files import store
from app.files.store import OWNER_MARK, FileStore
from app.settings import Settings
from worker.maintenance._slice import slice_over

log = logs.get(__name__)

# A job that names one of the files has just come in between: once more, without that file.
AGAIN = Retrying(retry=retry_if_exception_type(psycopg.IntegrityError), stop=stop_after_attempt(5), reraise=True)
PAGE = 1000
FIRST, LAST = UUID(int=0), UUID(int=2**128 - 1)
# The id at which the next slice goes on. A run that was killed is not repeated from the beginning either.
POSITION_KEY = "jobstack:cleanup_old_files:position"
POSITION_SECONDS = 6 * 3600


class Page(NamedTuple):
    """Storage and table side by side: all that either has between two ids."""

    after: UUID
    upto: UUID
    # id -> when its bytes were written.
    stored: dict[UUID, datetime]
    # id -> whether its row is older than 24 hours.
    rows: dict[UUID, bool]


def run(database: Database, client: redis.Redis | None, settings: Settings) -> dict[str, Any]:
    """Returns {"expired": 5, "bytes_without_row": 1, "rows_without_bytes": 1, "broken_uploads": 1}.

    Without `client` every run begins at the beginning.

    Raises:
        obstore.exceptions.GenericError: the storage is away, or refuses.
    """
    files = FileStore(settings)
    with files.errors():
        return _run(files, database, client, settings)


def _run(files: FileStore, database: Database, client: redis.Redis | None, settings: Settings) -> dict[str, Any]:
    over, done = slice_over(), Counter[str]()
    [about] = database.run(store.IDENTITY)
    if not _are_ours(files, database, about["identity"]):
        hint = f"if this database owns the storage, write {about['identity']} into its object {OWNER_MARK}"
        log.warning("storage_of_another_database", hint=f"correct STORAGE_URL or DATABASE_URL; {hint}")
        return {"skipped": "the storage belongs to another database"}
    position: Any = client.get(POSITION_KEY) if client else None
    done["broken_uploads"] = files.remove_parts(about["settled_before"])
    for page in _pages(files, database, UUID(position.decode()) if position else FIRST):
        done += _clean(page, files, database, about, settings.file_retention_days)
        if over() and page.upto < LAST:
            if client:
                client.set(POSITION_KEY, str(page.upto), ex=POSITION_SECONDS)
            return {**+done, "unfinished": True}
    if client:
        client.delete(POSITION_KEY)
    return dict(+done)


def _are_ours(files: FileStore, database: Database, identity: str) -> bool:
    """Whether this storage is this database's.

    With production's bucket and staging's database every file would look like an orphan, so an object in the storage
    names its owner. The first run writes it, if most of what either side has is known to the other.
    """
    owner = files.owner()
    if owner is None:
        first = next(_pages(files, database, FIRST))
        if 2 * len(first.stored.keys() & first.rows.keys()) < max(len(first.stored), len(first.rows)):
            return False
        files.claim(identity)
        owner = files.owner()
    return owner == identity


def _pages(files: FileStore, database: Database, after: UUID) -> Iterator[Page]:
    """From `after` to the end, at most so many of each side at a time."""
    listing, stored = files.ids(after), dict[UUID, datetime]()
    while True:
        stored |= islice(listing, PAGE - len(stored))
        upto = max(stored) if len(stored) == PAGE else LAST
        # Listed first: a row that comes meanwhile is too young to count.
        rows = database.run(store.PAGE, {"after": after, "upto": upto, "limit": PAGE})
        upto = rows[-1]["id"] if len(rows) == PAGE else upto
        here = {file_id: written for file_id, written in stored.items() if file_id <= upto}
        yield Page(after, upto, here, {row["id"]: row["settled"] for row in rows})
        if upto == LAST:
            return
        after, stored = upto, {file_id: written for file_id, written in stored.items() if file_id > upto}


def _clean(page: Page, files: FileStore, database: Database, about: dict[str, Any], days: int) -> Counter[str]:
    expired = set[UUID]()
    if days:  # 0: kept for ever
        params = {"after": page.after, "upto": page.upto, "days": days}
        expired = {row["id"] for row in AGAIN(database.run, store.DELETE_EXPIRED, params)}
    lost = [id_ for id_, settled in page.rows.items() if settled and id_ not in page.stored and id_ not in expired]
    orphans = [
        id_
        for id_, written in page.stored.items()
        if id_ not in page.rows and written < about["settled_before"] and about["newest"] and id_ < about["newest"]
    ]
    # Asked again, file by file: nothing is deleted because a list was late, or in another order.
    if lost := [id_ for id_ in lost if not files.has(id_)]:
        lost = [row["id"] for row in AGAIN(database.run, store.DELETE_UNUSED, {"ids": lost})]
    if orphans:
        known = {row["id"] for row in database.run(store.KNOWN, {"ids": orphans})}
        orphans = [id_ for id_ in orphans if id_ not in known]
    files.remove([*expired, *orphans])
    return Counter(expired=len(expired), bytes_without_row=len(orphans), rows_without_bytes=len(lost))
