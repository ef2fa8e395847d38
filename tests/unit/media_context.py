"""The outermost edge of a handler: a context that keeps steps and files in memory."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast
from uuid import UUID, uuid4

from worker.context import Context

T = TypeVar("T")


class MemoryContext:
    """Files and recorded steps of one job; the next attempt is another call with the same object."""

    def __init__(self) -> None:
        self.files: dict[UUID, bytes | BinaryIO] = {}
        self.saved: dict[UUID, tuple[str, bytes, str]] = {}
        self.steps: dict[str, str] = {}
        self.reports: list[tuple[float, float | None, str | None]] = []
        self.interrupt_at: float | None = None

    def add(self, data: bytes | BinaryIO) -> UUID:
        file_id = uuid4()
        self.files[file_id] = data
        return file_id

    def file_info(self, file_id: UUID) -> SimpleNamespace:
        with self.open_file(file_id) as file:
            return SimpleNamespace(size=file.seek(0, io.SEEK_END))

    @contextmanager
    def open_file(self, file_id: UUID) -> Iterator[BinaryIO]:
        data = self.files[file_id]
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        file.seek(0)
        yield file

    def once(self, name: str, call: Callable[[], T]) -> T:
        if name not in self.steps:
            self.steps[name] = json.dumps(call(), allow_nan=False)
        value: T = json.loads(self.steps[name])
        return value

    def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        self.reports.append((current, total, message))
        if self.interrupt_at == current:
            raise KeyboardInterrupt  # a BaseException, as those that end a handler are

    def checkpoint(self) -> None:
        pass

    def save_file(self, name: str, data: bytes, content_type: str, step: str | None = None) -> UUID:
        def save() -> str:
            file_id = uuid4()
            self.saved[file_id] = (name, data, content_type)
            return str(file_id)

        return UUID(self.once(step or f"file:{name}", save))

    def as_context(self) -> Context:
        return cast(Context, cast(Any, self))
