"""Uploads and results: bytes in a folder or an S3 bucket, their names and checksums in PostgreSQL.

A file is written once and never changed. Its path in the storage is its id: what a user called it is only a label.
"""

import asyncio
import errno
import hashlib
import io
import os
import re
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit
from uuid import UUID

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError
from obstore.store import LocalStore, ObjectStore, S3Store
from uuid_utils.compat import uuid7

from app.database import Database
from app.settings import Settings

INSERT = """
INSERT INTO files (id, name, size, content_type, sha256)
VALUES (%(id)s, %(name)s, %(size)s, %(content_type)s, %(sha256)s)
RETURNING id, name, size, content_type, sha256, created_at
"""
# A result belongs to its job from the first moment, so that clean-up never takes it from under a running one.
INSERT_RESULT = """
WITH file AS (
    INSERT INTO files (id, name, size, content_type, sha256)
    VALUES (%(id)s, %(name)s, %(size)s, %(content_type)s, %(sha256)s) ON CONFLICT DO NOTHING RETURNING id
)
INSERT INTO job_files (job_id, file_id) SELECT %(job_id)s, id FROM file
"""
GET = "SELECT id, name, size, content_type, sha256, created_at FROM files WHERE id = %(id)s"
GET_MANY = "SELECT id, name, size, content_type, sha256, created_at FROM files WHERE id = ANY(%(ids)s)"

# --- clean-up ---

# Which database this is. A dump that was restored elsewhere is another one; a copy of the server's whole disk is not.
# `newest`: bytes without a row that are newer than this may belong to a table that was emptied, or restored from an
# older backup, and is about to be mended.
IDENTITY = """
SELECT system_identifier || '/' || current_database() AS identity, now() - interval '24 hours' AS settled_before,
    (SELECT id FROM files WHERE created_at < now() - interval '24 hours' ORDER BY id DESC LIMIT 1) AS newest
FROM pg_control_system()
"""
PAGE = """
SELECT id, created_at < now() - interval '24 hours' AS settled FROM files
WHERE id > %(after)s AND id <= %(upto)s ORDER BY id LIMIT %(limit)s
"""
KNOWN = "SELECT id FROM files WHERE id = ANY(%(ids)s::uuid[])"
# Files past their time whose jobs are all over for as long. Those jobs are locked, so that none is retried meanwhile.
# Locks that somebody has are not waited for: who creates a job holds the file's, who retries or deletes one the job's.
# A job created between this statement's start and its lock makes it fail as a whole (job_files_file_id_fkey); one
# created later gets its 422.
DELETE_EXPIRED = """
WITH old AS MATERIALIZED (
    SELECT id FROM files
    WHERE id > %(after)s AND id <= %(upto)s AND created_at < now() - %(days)s * interval '1 day'
    ORDER BY id FOR UPDATE SKIP LOCKED
), over AS MATERIALIZED (
    SELECT l.job_id, l.file_id FROM job_files l JOIN jobs j ON j.id = l.job_id
    WHERE l.file_id IN (SELECT id FROM old) AND j.finished_at < now() - %(days)s * interval '1 day'
    FOR NO KEY UPDATE OF j SKIP LOCKED
), free AS MATERIALIZED (
    SELECT id FROM old WHERE NOT EXISTS (
        SELECT FROM job_files l WHERE l.file_id = old.id AND (l.job_id, l.file_id) NOT IN (SELECT * FROM over))
), unlinked AS (
    DELETE FROM job_files WHERE file_id IN (SELECT id FROM free)
)
DELETE FROM files WHERE id IN (SELECT id FROM free) RETURNING id
"""
# Rows whose bytes are lost.
DELETE_UNUSED = """
DELETE FROM files f WHERE id = ANY(%(ids)s::uuid[]) AND NOT EXISTS (SELECT FROM job_files l WHERE l.file_id = f.id)
RETURNING id
"""

READ_BYTES = 1024**2
# Our names in the storage; everything else there is somebody else's. `#1` and so on: what an upload into a folder has
# written so far.
NAME = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PART = re.compile(NAME.pattern + "#[0-9]+")
OWNER_MARK = "jobstack-owner"
# A full disk or quota, as obstore says it, and Python. Both have only the text.
NO_ROOM = re.compile(rf"^\[Errno ({errno.ENOSPC}|{errno.EDQUOT})\]|\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)$")


@dataclass(frozen=True)
class FileInfo:
    """What PostgreSQL knows of a file. `size` in bytes, `sha256` in hex."""

    id: UUID
    name: str
    size: int
    content_type: str
    sha256: str
    created_at: datetime


class FileStore:
    """The bytes. Paths are ids, so nothing that a user sends can reach outside."""

    def __init__(self, settings: Settings) -> None:
        self._store = _open_store(settings)
        self._folder = self._store.prefix if isinstance(self._store, LocalStore) else None

    # --- workers (sync) ---

    def info(self, database: Database, file_id: UUID) -> FileInfo:
        rows = database.run_until_answered(GET, {"id": file_id})
        if not rows:
            raise FileNotFoundError(f"there is no file {file_id}")
        return FileInfo(**rows[0])

    @contextmanager
    def open(self, file_id: UUID) -> Iterator[BinaryIO]:
        """A seekable stream that reads ranges as they are asked for."""
        with self.errors():
            reader = obstore.open_reader(self._store, str(file_id), buffer_size=READ_BYTES)
        with io.BufferedReader(_RawReader(reader), READ_BYTES) as stream:
            yield cast(BinaryIO, stream)

    def save(self, database: Database, job_id: UUID, name: str, data: bytes, content_type: str) -> UUID:
        """Writes the bytes, then the row: a row never speaks of bytes that are not there."""
        file_id = uuid7()
        with self.errors():
            obstore.put(self._store, str(file_id), data)
        row = {
            "id": file_id,
            "name": name,
            "size": len(data),
            "content_type": content_type,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        database.run_until_answered(INSERT_RESULT, row | {"job_id": job_id})
        return file_id

    # --- the API (async) ---

    async def write(self, file_id: UUID, chunks: AsyncIterable[bytes]) -> tuple[int, str]:
        """Streams to storage; returns (bytes, sha256 in hex). What `chunks` raises leaves nothing behind."""
        digest, size = hashlib.sha256(), 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        await obstore.put_async(self._store, str(file_id), counted())
        return size, digest.hexdigest()

    async def read(self, file_id: UUID) -> AsyncIterator[bytes]:
        """The bytes in pieces. Raises FileNotFoundError before the first piece."""
        try:
            found = await obstore.get_async(self._store, str(file_id))
        except FileNotFoundError:
            await self.check()
            raise

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in found.stream(min_chunk_size=READ_BYTES):
                yield bytes(piece)

        return pieces()

    async def delete(self, file_id: UUID) -> None:
        try:
            await obstore.delete_async(self._store, str(file_id))
        except FileNotFoundError:
            return

    # --- clean-up (sync) ---

    def owner(self) -> str | None:
        """The identity of the database whose files these are; None if nobody has said so yet."""
        try:
            return bytes(obstore.get(self._store, OWNER_MARK).bytes()).decode().strip()
        except FileNotFoundError:
            return None

    def claim(self, owner: str) -> None:
        """Says whose files these are, unless somebody has."""
        with suppress(AlreadyExistsError):
            obstore.put(self._store, OWNER_MARK, owner.encode(), mode="create")

    def ids(self, after: UUID) -> Iterator[tuple[UUID, datetime]]:
        """The files that are there, by id, with the time of their last change."""
        if self._folder:
            names = (entry.name for entry in os.scandir(self._folder))
            for name in sorted(name for name in names if NAME.fullmatch(name) and name > str(after)):
                with suppress(FileNotFoundError):
                    yield UUID(name), _changed(self._folder / name)
            return
        # S3 lists in this order.
        for page in obstore.list(self._store, offset=str(after), chunk_size=1000):
            for found in page:
                if NAME.fullmatch(found["path"]):
                    yield UUID(found["path"]), found["last_modified"]

    def has(self, file_id: UUID) -> bool:
        try:
            return bool(obstore.head(self._store, str(file_id)))
        except FileNotFoundError:
            return False

    def remove(self, file_ids: Sequence[UUID]) -> None:
        """Deletes bytes. What is gone already is no error."""
        if self._folder:
            for file_id in file_ids:
                (self._folder / str(file_id)).unlink(missing_ok=True)
        elif file_ids:
            obstore.delete(self._store, [str(file_id) for file_id in file_ids])

    def remove_parts(self, before: datetime) -> int:
        """Deletes what uploads that were killed left in a folder. In S3 a lifecycle rule of the bucket does that."""
        if not self._folder:
            return 0
        parts = [Path(entry.path) for entry in os.scandir(self._folder) if PART.fullmatch(entry.name)]
        old = [part for part in parts if _changed(part) < before]
        for part in old:
            part.unlink(missing_ok=True)
        return len(old)

    async def check(self) -> None:
        """Raises obstore's BaseError if the storage can't be reached, or if a folder can't be written to."""
        if self._folder:
            try:
                # A missing folder would be an empty list.
                await asyncio.to_thread(lambda: tempfile.TemporaryFile(dir=self._folder).close())
            except OSError as error:
                raise GenericError(str(error)) from error
            return
        # Of a missing bucket S3 says "not found" as of a missing file; only a list, however short, tells them apart.
        async for _ in obstore.list(self._store, prefix=OWNER_MARK):
            return

    @contextmanager
    def errors(self) -> Iterator[None]:
        """For workers: FileNotFoundError means that the file is gone, GenericError, in a line, that another try may
        help."""
        try:
            try:
                yield
            except FileNotFoundError:
                if not self._folder:
                    next(iter(obstore.list(self._store, prefix=OWNER_MARK)), None)  # see `check`
                raise
        except BaseError as error:
            # Whatever the class: keys that are just being changed are not the job's fault.
            raise GenericError(in_short(error)) from error


class _RawReader(io.RawIOBase):
    """obstore's reader as Python's, so that Pillow, soundfile and others take it."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read(len(buffer))
        buffer[: len(data)] = memoryview(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())


def in_short(error: BaseError) -> str:
    """What happened, without obstore's pages of debugging, and without S3's answer but its code: it repeats the key."""
    text, _, body = str(error).partition("\n\nDebug source")[0].partition("<?xml")
    code = re.search(r"<Code>(\w+)", body)
    return f"{text.strip()} {code[1] if code else ''}".strip()


def is_full(error: BaseError) -> bool:
    """Whether the folder's disk or quota has no room left. Of a bucket nobody can tell."""
    return NO_ROOM.search(in_short(error)) is not None


def _changed(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _open_store(settings: Settings) -> ObjectStore:
    parts = urlsplit(settings.storage_url)
    if parts.scheme == "file":
        return LocalStore(unquote(parts.path), mkdir=True)
    endpoint = (settings.aws_endpoint_url or "").rstrip("/")
    if endpoint and settings.aws_virtual_hosted_style_request:
        # obstore takes it as it is.
        host = urlsplit(endpoint)
        if not host.netloc.startswith(f"{parts.netloc}."):
            endpoint = urlunsplit(host._replace(netloc=f"{parts.netloc}.{host.netloc}"))
    given: dict[str, Any] = {
        "endpoint": endpoint,
        "region": settings.aws_region,
        "access_key_id": settings.aws_access_key_id and settings.aws_access_key_id.get_secret_value(),
        "secret_access_key": settings.aws_secret_access_key and settings.aws_secret_access_key.get_secret_value(),
    }
    # A storage that says nothing for 30 s is given up; a download may take as long as its reader. By default a request
    # is tried ten times, for minutes: who asks for a file tries again anyway.
    return S3Store.from_url(
        settings.storage_url,
        client_options={"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1h", "allow_http": True},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
        virtual_hosted_style_request=settings.aws_virtual_hosted_style_request,
        **{name: value for name, value in given.items() if value},
    )
