"""Uploads and results: bytes in a folder or an S3 bucket, their names and checksums in PostgreSQL.

A file is written once and never changed. Its path in the storage is its id: what a user called it is only a label.
"""

import asyncio
import hashlib
import io
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit
from uuid import UUID

import obstore
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

READ_BYTES = 1024**2


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
        self._store = _open_store(settings.storage_url)

    # --- workers (sync) ---

    def info(self, database: Database, file_id: UUID) -> FileInfo:
        rows = database.run_until_answered(GET, {"id": file_id})
        if not rows:
            raise FileNotFoundError(f"there is no file {file_id}")
        return FileInfo(**rows[0])

    @contextmanager
    def open(self, file_id: UUID) -> Iterator[BinaryIO]:
        """A seekable stream that reads ranges as they are asked for."""
        reader = obstore.open_reader(self._store, str(file_id), buffer_size=READ_BYTES)
        with io.BufferedReader(_RawReader(reader), READ_BYTES) as stream:
            yield cast(BinaryIO, stream)

    def save(self, database: Database, job_id: UUID, name: str, data: bytes, content_type: str) -> UUID:
        """Writes the bytes, then the row: a row never speaks of bytes that are not there."""
        file_id = uuid7()
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
        found = await obstore.get_async(self._store, str(file_id))

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in found.stream(min_chunk_size=READ_BYTES):
                yield bytes(piece)

        return pieces()

    async def delete(self, file_id: UUID) -> None:
        try:
            await obstore.delete_async(self._store, str(file_id))
        except FileNotFoundError:
            return

    async def check(self) -> None:
        """Raises if the storage can't be reached, or if a folder can't be written to."""
        if isinstance(self._store, LocalStore):
            # A missing folder would be an empty list.
            folder = self._store.prefix
            await asyncio.to_thread(lambda: tempfile.TemporaryFile(dir=folder).close())
            return
        async for _ in obstore.list(self._store, chunk_size=1):
            return


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


def _open_store(url: str) -> ObjectStore:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalStore(unquote(parts.path), mkdir=True)
    # Credentials come from AWS_* variables; every request has a time limit, as everything on a network has here.
    return S3Store.from_url(url, client_options={"timeout": "30s", "connect_timeout": "5s"})
