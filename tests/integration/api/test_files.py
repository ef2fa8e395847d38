"""Uploads and downloads."""

import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow

from app.settings import Settings
from tests.integration.api.conftest import answers, count, problem
from tests.processes import Process
from tests.servers import Redis, free_port
from tests.waiting import until

Db = psycopg.Connection[DictRow]
Stored = Callable[[], list[str]]
MB = 1024 * 1024


def send(api: httpx.Client, name: str = "a.bin", data: bytes = b"abc", content_type: str = "image/png") -> Any:
    answer = api.post("/api/files", files={"file": (name, data, content_type)})
    assert answer.status_code == 201, answer.text
    return answer.json()


def multipart(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> dict[str, Any]:
    """Arguments for httpx: (content of Content-Disposition, bytes) of each part, as they are."""
    body = b"".join(
        b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"
        for disposition, data in parts
    )
    return {"content": body + end, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


FILE = 'form-data; name="file"; filename="a.txt"'


def test_what_goes_in_comes_out(api: httpx.Client, db: Db, stored: Stored) -> None:
    data = bytes(range(256)) * 5000
    answer = api.post("/api/files", files={"file": ("photo.png", data, "image/png")})
    file = answer.json()
    expected = {"name": "photo.png", "size": len(data), "content_type": "image/png"}
    assert answer.status_code == 201
    assert file == {"id": file["id"], "sha256": hashlib.sha256(data).hexdigest(), **expected}
    assert answer.headers["location"] == f"/api/files/{file['id']}"
    assert api.get(answer.headers["location"]).json() == file
    download = api.get(f"/api/files/{file['id']}/content")
    assert download.content == data
    assert download.headers["content-length"] == str(len(data))
    assert download.headers["content-type"] == "image/png"
    assert download.headers["etag"] == f'"{file["sha256"]}"'
    assert download.headers["x-content-type-options"] == "nosniff"
    assert download.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert file["id"] in stored()
    assert count(db, "files") == 1


@pytest.mark.parametrize("data", [b"", b"\r\n--x\r\n--", b"\r\n" * 70_000, b"-" * 200_000])
def test_bytes_that_look_like_boundaries(api: httpx.Client, data: bytes) -> None:
    file = send(api, data=data)
    assert api.get(f"/api/files/{file['id']}/content").content == data


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("image/png", "image/png"),
        ("Text/HTML; charset=latin-1", "text/html"),
        ("nonsense", "application/octet-stream"),
        ("text/html\tx", "application/octet-stream"),
        (f"text/{'x' * 100}", "application/octet-stream"),
    ],
)
def test_content_types(api: httpx.Client, sent: str, kept: str) -> None:
    file = send(api, content_type=sent)
    assert file["content_type"] == kept
    assert api.get(f"/api/files/{file['id']}/content").headers["content-type"] == kept


@pytest.mark.parametrize("name", ["ü ß 日本 🎧.wav", "it's 100%; a=b.txt", "a'b.txt", "...", "-rf", "a" * 255, "CON"])
def test_odd_names(api: httpx.Client, name: str) -> None:
    file = send(api, name=name)
    assert file["name"] == name
    disposition = api.get(f"/api/files/{file['id']}/content").headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert unquote(disposition.partition("filename*=UTF-8''")[2]) == name
    assert disposition.isascii()


def test_a_quote_in_a_name_ends_no_header(api: httpx.Client) -> None:
    answer = api.post("/api/files", **multipart(('form-data; name="file"; filename="a\\"; evil=\\"b.txt"', b"x")))
    file = answer.json()
    assert file["name"] == 'a"; evil="b.txt'
    disposition = api.get(f"/api/files/{file['id']}/content").headers["content-disposition"]
    assert disposition == ("attachment; filename=\"a_; evil=_b.txt\"; filename*=UTF-8''a%22%3B%20evil%3D%22b.txt")


def test_other_fields_are_ignored(api: httpx.Client) -> None:
    other = ('form-data; name="other"; filename="b.txt"', b"other")
    answer = api.post("/api/files", **multipart(("form-data; name=note", b"hello"), other, (FILE, b"it"), other))
    assert answer.status_code == 201, answer.text
    assert (answer.json()["name"], answer.json()["size"]) == ("a.txt", 2)


@pytest.mark.parametrize(
    ("request_", "status"),
    {
        "no file": (multipart(("form-data; name=note", b"hello")), 422),
        "no file name": (multipart(("form-data; name=file", b"hello")), 422),
        "empty file name": (multipart(('form-data; name="file"; filename=""', b"x")), 422),
        "no parts": (multipart(), 422),
        "nothing": ({"headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 422),
        "two files": (multipart((FILE, b"1"), (FILE, b"2")), 422),
        "cut off in the file": (multipart((FILE, b"hello"), end=b""), 422),
        "cut off in the end": (multipart((FILE, b"hello"), end=b"--x-"), 422),
        "cut off in a head": (multipart(("form-data", b""), end=b"--x\r\nContent-Dispos"), 422),
        "no boundary": ({"content": b"--x--", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        "another boundary": (
            {**multipart((FILE, b"1")), "headers": {"Content-Type": "multipart/form-data; boundary=y"}},
            422,
        ),
        "a huge boundary": (
            {"content": b"-", "headers": {"Content-Type": f"multipart/form-data; boundary={'y' * 300}"}},
            422,
        ),
        "a broken head": (multipart((f"{FILE}\r\n: x", b"1")), 422),
        "a huge head": (multipart((FILE + "; x=" + "y" * 100_000, b"1")), 422),
        "a name in latin-1": (
            {**multipart((FILE, b"1")), "content": multipart((FILE, b"1"))["content"].replace(b"a.t", b"\xfc.t")},
            422,
        ),
        "json": ({"json": {"file": "x"}}, 415),
        "a form": ({"data": {"file": "x"}}, 415),
        "bare bytes": ({"content": b"x", "headers": {"Content-Type": "image/png"}}, 415),
        "no content type": ({"content": b"x"}, 415),
        **{
            f"named {name!r}": (multipart((f'form-data; name="file"; filename="{name}"', b"x")), 422)
            for name in ("../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "a\\\\b", "a\x00b", "a\x7fb", "b" * 256)
        },
    }.values(),
)
def test_uploads_that_are_refused(
    api: httpx.Client, db: Db, stored: Stored, request_: dict[str, Any], status: int
) -> None:
    before = stored()
    problem(api.post("/api/files", **request_), status)
    assert count(db, "files") == 0
    assert stored() == before


def chunks(number: int, size: int = 1000) -> Iterator[bytes]:
    """A multipart body, piece by piece, around a file of `number * size` bytes."""
    yield multipart((FILE, b"|"))["content"].partition(b"|")[0]
    for _ in range(number):
        yield b"z" * size
    yield b"\r\n--x--\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "fits"), [(500, True), (501, False), (2000, False)])
def test_the_limit(
    serve: Callable[..., httpx.Client], db: Db, stored: Stored, chunked: bool, size: int, fits: bool
) -> None:
    api, before = serve(max_upload_bytes=500_000), stored()
    body = chunks(size) if chunked else b"".join(chunks(size))
    answer = api.post("/api/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    if fits:
        assert answer.status_code == 201, answer.text
        assert len(stored()) == len(before) + 1
    else:
        assert "bytes at most" in problem(answer, 413, "too-large")["detail"]
        assert stored() == before
        assert count(db, "files") == 0
    # The connection still works: what came too much was read and forgotten.
    assert api.get("/health/live").status_code == 200


def test_a_connection_that_ends_early_leaves_nothing(api: httpx.Client, db: Db, stored: Stored) -> None:
    before = stored()
    address = urlsplit(str(api.base_url))
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = "POST /api/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        connection.sendall(multipart((FILE, b"z" * 8 * MB), end=b"")["content"])
        until(lambda: len(stored()) > len(before), "bytes are arriving")
    until(lambda: stored() == before, "they are gone")
    assert count(db, "files") == 0


@pytest.mark.slow
def test_memory_stays_flat(serve_process: Callable[..., tuple[httpx.Client, Process]], stored: Stored) -> None:
    api, process = serve_process()
    send(api, data=b"z" * MB)
    before = process.peak_bytes()
    body = chunks(200, MB)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    file = api.post("/api/files", content=body, headers=headers, timeout=60).json()
    assert file["size"] == 200 * MB
    uploaded = process.peak_bytes() - before
    with api.stream("GET", f"/api/files/{file['id']}/content") as download:
        assert sum(map(len, download.iter_raw())) == file["size"]
    assert uploaded < 100 * MB, f"{uploaded / MB:.0f} MB for the upload"
    both = process.peak_bytes() - before
    assert both < 100 * MB, f"{both / MB:.0f} MB for both"


@pytest.mark.parametrize("path", ["", "/content"])
def test_a_file_that_is_not_there(api: httpx.Client, path: str) -> None:
    file_id = uuid4()
    assert str(file_id) in problem(api.get(f"/api/files/{file_id}{path}"), 404, "unknown-file")["detail"]


def test_a_file_whose_bytes_are_lost(api: httpx.Client, settings: Settings) -> None:
    file = send(api)
    (Path(settings.storage_url.removeprefix("file://")) / file["id"]).unlink()
    problem(api.get(f"/api/files/{file['id']}/content"), 404, "lost-file")


def test_a_storage_that_fails_is_a_503(api: httpx.Client, db: Db, settings: Settings, stored: Stored) -> None:
    folder = Path(settings.storage_url.removeprefix("file://"))
    aside = folder.rename(folder.with_name("aside"))
    try:
        folder.write_bytes(b"not a folder")
        answer = api.post("/api/files", files={"file": ("a", b"abc")})
        assert "storage" in problem(answer, 503, "unavailable")["detail"]
        assert count(db, "files") == 0
    finally:
        folder.unlink()
        aside.rename(folder)


@pytest.mark.parametrize("room", ["size=1m", "nr_inodes=1"])
def test_a_full_disk_is_a_507(db: Db, redis: Redis, tmp_path: Path, room: str) -> None:
    # A disk of its own, which needs no root: seen by this process alone.
    own = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody have a disk of his own")
    port, disk = free_port(), tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o {room} none {disk} && exec {sys.executable} -m app.api"
    process = Process([*own, "sh", "-c", mounted], tmp_path, PORT=port, STORAGE_URL=f"file://{disk}")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as api:
            until(lambda: answers(api) or process.process.poll() is not None, "the API answers")
            answer = api.post("/api/files", files={"file": ("a", bytes(3 * MB))})
            assert "full" in problem(answer, 507, "storage-full")["detail"]
            assert count(db, "files") == 0
            assert "storage_full" in process.log
            if room == "size=1m":
                assert send(api)["size"] == 3, "what fits is kept"
    finally:
        process.kill()
