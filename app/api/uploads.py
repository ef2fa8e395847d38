"""Multipart uploads, streamed: no byte of the file waits on this machine's disk, and memory holds one piece of it."""

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.errors import Problem, too_large

LONGEST_NAME = 255
CONTENT_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}")


def _malformed(detail: str) -> Problem:
    return Problem(422, "malformed-upload", detail)


def _checked_name(raw: bytes) -> str:
    """A label for people. One that looks like a path is refused instead of guessed at."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _malformed("The file's name is not UTF-8.") from None
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name) or len(name) > LONGEST_NAME:
        raise _malformed(
            f"The file's name must have 1 to {LONGEST_NAME} characters, no slashes and no control characters."
        )
    return name


class Upload:
    """One `file` field of a multipart body. `name` and `content_type` are known before the first chunk."""

    def __init__(self, request: Request, limit: int) -> None:
        content_type, options = parse_options_header(request.headers.get("content-type"))
        if content_type != b"multipart/form-data":
            raise Problem(415, "not-multipart", "Send multipart/form-data with a field named file.")
        boundary = options.get(b"boundary")
        if not boundary:
            raise _malformed("The Content-Type header has no boundary.")
        self.name = ""
        self.content_type = "application/octet-stream"
        self._stream = request.stream()
        self._limit = limit
        self._pieces: list[bytes] = []
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._in_file = self._found = self._ended = False
        callbacks: Any = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _malformed(f"The Content-Type header is malformed: {error}") from None

    async def start(self) -> None:
        """Reads up to the file's head, so that `name` and `content_type` are known.

        Raises:
            Problem: there is no field `file`, or its name is unusable.
        """
        while not self._found:
            if not await self._feed():
                raise _malformed("There is no field named file with a file name.")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes. Raises Problem for one that is too large or cut off."""
        size = 0
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                size += len(piece)
                if size > self._limit:
                    raise too_large("A file", self._limit)
                yield piece
            if not self._pieces and not await self._feed():
                break
        if not self._ended:
            raise _malformed("The body ends in the middle of the file.")

    async def _feed(self) -> bool:
        try:
            chunk = await anext(self._stream)
        except StopAsyncIteration:
            return False
        if chunk:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise _malformed(f"The multipart body is malformed: {error}") from None
        return True

    def _part_begin(self) -> None:
        self._headers, self._in_file = {}, False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end].lower()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers[self._header] = self._headers.get(self._header, b"") + data[start:end]

    def _header_end(self) -> None:
        self._header = b""

    def _headers_finished(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or options.get(b"name") != b"file" or b"filename" not in options:
            return
        if self._found:
            raise _malformed("Send one file a request.")
        self._found = self._in_file = True
        self.name = _checked_name(options[b"filename"])
        content_type = self._headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
        if CONTENT_TYPE.fullmatch(content_type):
            self.content_type = content_type.lower()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        self._in_file = False

    def _end(self) -> None:
        self._ended = True
