"""The multipart parser: the same file comes out, however the body is cut into pieces on its way."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from app.api.errors import Problem
from app.api.uploads import Upload


def read(body: bytes, cuts: list[int], *, limit: int = 10_000) -> tuple[str, str, bytes]:
    """(name, content type, bytes) of an upload that arrives in pieces of these sizes, and then the rest."""

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        rest = body
        for cut in cuts:
            yield {"type": "http.request", "body": rest[:cut], "more_body": True}
            rest = rest[cut:]
        yield {"type": "http.request", "body": rest, "more_body": False}

    messages = pieces()
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "headers": headers}, messages.__anext__)

    async def run() -> tuple[str, str, bytes]:
        upload = Upload(request, limit)
        await upload.start()
        data = b"".join([piece async for piece in upload.chunks()])
        return upload.name, upload.content_type, data

    return asyncio.run(run())


def body(data: bytes) -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="\xc3\xbc.txt"\r\nContent-Type: Text/Plain\r\n\r\n'
    other = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
    return other + b"--x\r\n" + head + data + b"\r\n" + other + b"--x--\r\n"


near_boundaries = st.lists(st.sampled_from([b"\r", b"\n", b"-", b"x", b"--", b"\r\n", b"\r\n-", b"\r\n--", b"a"]))
cuts = st.lists(st.integers(0, 50), max_size=40)


@given(near_boundaries.map(b"".join).filter(lambda data: b"\r\n--x" not in b"\r\n" + data + b"\r\n"), cuts)
def test_any_cut_gives_the_same_file(data: bytes, cuts: list[int]) -> None:
    assert read(body(data), cuts) == ("ü.txt", "text/plain", data)


@given(st.integers(0, len(body(b"data")) - 3), cuts)
def test_a_cut_off_body_is_never_a_file(end: int, cuts: list[int]) -> None:
    with pytest.raises(Problem) as refused:
        read(body(b"data")[:end], cuts)
    assert refused.value.status_code == 422


@given(st.binary(max_size=300), cuts)
def test_any_bytes_are_a_file_or_a_problem(body: bytes, cuts: list[int]) -> None:
    with pytest.raises(Problem):
        read(body, cuts)


@pytest.mark.parametrize(("size", "fits"), [(100, True), (101, False)])
def test_the_limit_is_the_files(size: int, fits: bool) -> None:
    if fits:
        assert len(read(body(b"z" * size), [], limit=100)[2]) == size
    else:
        with pytest.raises(Problem, match="100 bytes"):
            read(body(b"z" * size), [], limit=100)
