"""Reading a stored file through a library in C."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


@contextmanager
def reading(file: BinaryIO) -> Iterator[io.BufferedReader]:
    """`file` once more; if a read of it fails inside the block, the block raises that error and no other.

    A library in C calls back into Python to read. libsndfile then loses the exception and takes it for the end of the
    file; Pillow's OSError for a damaged picture can't be told from one of the storage. Without this, a storage that was
    away for a second, or a time limit that struck during a read, would be a bad file for good.
    """
    source = _Source(file)
    try:
        yield io.BufferedReader(source)
    finally:
        if source.failure is not None:
            raise source.failure


class _Source(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: BaseException | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except BaseException as error:  # noqa: BLE001 `reading` raises it, whatever it is
            self.failure = error
            return 0  # the end of the file: what the library would make of an exception, but without its noise
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)
