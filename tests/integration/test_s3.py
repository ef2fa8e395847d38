"""Files in S3: API and workers share no disk; a storage that is away, refuses or lost its bucket costs no job."""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from obstore.exceptions import GenericError
from PIL import Image
from psycopg.rows import DictRow
from pydantic import SecretStr

from app.database import Database
from app.files.store import OWNER_MARK, FileStore
from app.settings import Settings
from tests import processes, servers
from tests.integration.api.test_files import chunks
from tests.integration.test_media_kinds import measured_as_expected, recording
from tests.processes import Process
from tests.servers import S3, Redis
from tests.waiting import until
from worker.handlers import waveform
from worker.maintenance import cleanup_old_files
from worker.runner import Runner

Connection = psycopg.Connection[DictRow]
RunKind = Callable[..., dict[str, Any]]
MB = 1024 * 1024
PREFIX = "jobstack/"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """The S3 server. Whoever takes it away brings it back."""
    with servers.s3_server() as server:
        yield server


@pytest.fixture
def settings(environment: Redis, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Instead of those with a folder, for everything that a test here starts."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


def send(api: httpx.Client, data: bytes, name: str = "a.bin", content_type: str = "image/png") -> dict[str, Any]:
    answer = api.post("/api/files", files={"file": (name, data, content_type)}, timeout=60)
    assert answer.status_code == 201, answer.text
    file: dict[str, Any] = answer.json()
    return file


@pytest.fixture
def upload(api: httpx.Client) -> Callable[..., str]:
    def put(name: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        return str(send(api, data, name, content_type)["id"])

    return put


def in_time(answer: Callable[[], httpx.Response]) -> httpx.Response:
    began = time.monotonic()
    given = answer()
    assert time.monotonic() - began < 10  # the API gives up after 4 s; the rest is for a busy machine
    return given


# Nothing, one part, several parts and a bit.
@pytest.mark.parametrize("size", [0, 1000, 11 * MB + 7])
def test_what_goes_in_comes_out(api: httpx.Client, s3: S3, size: int) -> None:
    data = bytes(range(251)) * (size // 251) + bytes(size % 251)
    file = send(api, data, name="a b?c#%2e.png")
    assert (file["size"], file["sha256"]) == (size, hashlib.sha256(data).hexdigest())
    download = api.get(f"/api/files/{file['id']}/content")
    assert download.status_code == 200
    assert download.content == data
    # What a browser is told does not depend on where the bytes are.
    assert download.headers["content-type"] == "image/png"
    assert download.headers["content-disposition"].startswith("attachment; ")
    assert download.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert PREFIX + file["id"] in s3.paths()


def test_an_upload_that_is_refused_half_way_leaves_nothing(settings: Settings, db: Connection, s3: S3) -> None:
    before = s3.paths()
    small = settings.model_copy(update={"max_upload_bytes": 20 * MB})
    with processes.serving(small) as address, httpx.Client(base_url=address, timeout=60) as api:
        answer = api.post("/api/files", files={"file": ("a", bytes(20 * MB + 1))})
    assert answer.status_code == 413
    assert s3.paths() == before


def test_a_file_whose_bytes_are_lost(api: httpx.Client, settings: Settings) -> None:
    file = send(api, b"abc")
    FileStore(settings).remove([UUID(file["id"])])
    answer = api.get(f"/api/files/{file['id']}/content")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:jobstack:problem:lost-file")


def test_a_worker_that_shares_no_disk_with_the_api(
    api: httpx.Client, start: Callable[..., Process], s3: S3, tmp_path: Path
) -> None:
    photo = io.BytesIO()
    Image.radial_gradient("L").resize((800, 600)).save(photo, "PNG")
    file = send(api, photo.getvalue(), "photo.png")
    start("worker")
    job = api.post("/api/jobs", json={"kind": "thumbnail", "payload": {"file_id": file["id"], "width": 200}}).json()

    def over() -> Any:
        now = api.get(f"/api/jobs/{job['id']}").json()
        return now if now["finished_at"] else None

    done = until(over, "the job is over", seconds=60)
    assert done["status"] == "succeeded", done["error"]
    result = api.get(f"/api/files/{done['result']['file_id']}/content")
    assert Image.open(io.BytesIO(result.content)).size == (200, 150)
    assert {PREFIX + file["id"], PREFIX + done["result"]["file_id"]} <= s3.paths()


def test_clean_up(
    api: httpx.Client,
    settings: Settings,
    db: Connection,
    database: Database,
    redis: Redis,
    s3: S3,
    insert_job: Callable[..., UUID],
) -> None:
    files = FileStore(settings)
    files.remove([file_id for file_id, _ in files.ids(UUID(int=0))])

    def run() -> dict[str, Any]:
        return cleanup_old_files.run(database, redis.client, settings)

    def old(*, needed: bool = False) -> str:
        file_id = str(send(api, b"bytes")["id"])
        db.execute("UPDATE files SET created_at = now() - interval '31 days' WHERE id = %s", [file_id])
        if needed:
            db.execute("INSERT INTO job_files VALUES (%s, %s)", [insert_job(), file_id])
        return file_id

    young, needed = str(send(api, b"bytes")["id"]), old(needed=True)
    gone = [old() for _ in range(3)]
    assert run() == {"expired": 3}
    assert s3.paths() == {PREFIX + name for name in (OWNER_MARK, young, needed)}
    for file_id in gone:
        assert api.get(f"/api/files/{file_id}").status_code == 404
    lost = old()
    db.execute("UPDATE files SET created_at = now() - interval '2 days' WHERE id = %s", [lost])
    files.remove([UUID(lost)])
    assert run() == {"rows_without_bytes": 1}
    db.execute("TRUNCATE files, job_files")
    assert run() == {}, "an emptied table costs no bytes"
    assert len(s3.paths()) == 3


def damaged(settings: Settings, what: str) -> Settings:
    changes: dict[str, dict[str, Any]] = {
        "the secret": {"aws_secret_access_key": SecretStr("another")},
        "the key": {"aws_access_key_id": SecretStr("nobody")},
        "the bucket": {"storage_url": "s3://another/jobstack"},
    }
    return settings.model_copy(update=changes[what])


@pytest.mark.parametrize("wrong", ["the secret", "the key", "the bucket"])
def test_a_wrong_setting_is_a_storage_that_is_away_and_no_lost_file(
    api: httpx.Client, settings: Settings, db: Connection, database: Database, redis: Redis, wrong: str
) -> None:
    file, wrongly = send(api, b"one two three"), damaged(settings, wrong)
    with processes.serving(wrongly) as address, httpx.Client(base_url=address, timeout=10) as other:
        for answer in (
            in_time(lambda: other.post("/api/files", files={"file": ("a", b"abc")})),
            in_time(lambda: other.get(f"/api/files/{file['id']}/content")),
        ):
            assert answer.status_code == 503, answer.text
            assert "storage" in answer.json()["detail"]

        def only_the_storage_is_away() -> bool:
            ready = other.get("/health/ready").json()["checks"]
            return (ready["storage"], ready["postgres"]) == ("unavailable", "ok")

        until(only_the_storage_is_away, "nothing else is")
    with pytest.raises(GenericError, match=r"403|404") as refused:
        cleanup_old_files.run(database, redis.client, wrongly)
    assert len(str(refused.value)) < 300, "not obstore's pages of debugging"
    [rows] = db.execute("SELECT count(*) AS n FROM files")
    assert rows["n"] == 1


@pytest.mark.parametrize("wrong", ["the secret", "the bucket"])
def test_a_worker_with_a_wrong_setting_leaves_the_job_for_later(
    api: httpx.Client, settings: Settings, db: Connection, wrong: str, insert_job: Callable[..., UUID]
) -> None:
    job_id = insert_job("text_report", {"file_id": send(api, b"one two three")["id"]})
    runner = Runner(damaged(settings, wrong), worker="test", may_kill=False)
    try:
        claim = runner.claim(job_id)
        assert claim is not None
        runner.run(claim)
    finally:
        runner.close()
    job = api.get(f"/api/jobs/{job_id}").json()
    assert (job["status"], job["attempt"]) == ("queued", 1), job
    [attempt] = db.execute("SELECT error FROM job_attempts WHERE job_id = %s", [job_id])
    assert len(attempt["error"]["message"]) < 300, "not obstore's pages of debugging"


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_a_storage_that_is_away(api: httpx.Client, s3: S3, db: Connection, how: str) -> None:
    file = send(api, b"abc")
    (s3.refuse if how == "stopped" else s3.freeze)()
    try:
        answers = [
            in_time(lambda: api.post("/api/files", files={"file": ("a", bytes(3 * MB))})),
            in_time(lambda: api.get(f"/api/files/{file['id']}/content")),
        ]
        ready = in_time(lambda: api.get("/health/ready"))
        # Jobs without files don't notice.
        job = in_time(lambda: api.post("/api/jobs", json={"kind": "sleep", "payload": {"seconds": 0}}))
    finally:
        (s3.accept if how == "stopped" else s3.thaw)()
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"]
    assert ready.json()["checks"]["storage"] == "unavailable"
    assert job.status_code == 202
    [rows] = db.execute("SELECT count(*) AS n FROM files")
    assert rows["n"] == 1
    until(lambda: api.get("/health/ready").json()["checks"]["storage"] == "ok", "it is ready again")
    assert api.get(f"/api/files/{file['id']}/content").content == b"abc"


def test_a_long_job_goes_on_where_the_storage_went_away(
    run_kind: RunKind, upload: Callable[..., str], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], waveform.measured

    def until_the_storage_goes(sound: Any, number: int, chunk_seconds: int) -> waveform.Chunk:
        measured.append(number)
        if number == 6 and measured.count(6) == 1:
            s3.refuse()
        return measure(sound, number, chunk_seconds)

    monkeypatch.setattr(waveform, "measured", until_the_storage_goes)
    # Longer than what one read of the storage brings.
    payload = {"file_id": upload("talk.wav", recording(400)), "chunk_seconds": 40}
    try:
        job = run_kind("waveform", payload)
    finally:
        s3.accept()
    assert (job["status"], job["attempt"]) == ("queued", 1), job["error"]
    # Not always 6: what was read ahead may be enough for one more.
    failed = measured[-1]
    job = run_kind("waveform", payload, job_id=job["id"])
    assert job["status"] == "succeeded", job["error"]
    measured_as_expected(job["result"], 400)
    assert sorted(measured) == sorted([*range(10), failed]), "that chunk twice, the others once"


@pytest.mark.slow
def test_memory_stays_flat(settings: Settings, db: object, tmp_path: Path) -> None:
    port = servers.free_port()
    with (
        processes.running("app.api", tmp_path, PORT=port) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as api,
    ):

        def answers() -> bool:
            try:
                return api.get("/health/live").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "the API answers")

        send(api, b"z" * MB)
        before = process.peak_bytes()
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        file = api.post("/api/files", content=chunks(300, MB), headers=headers).json()
        assert file["size"] == 300 * MB
        uploaded = process.peak_bytes() - before
        with api.stream("GET", f"/api/files/{file['id']}/content") as download:
            assert sum(map(len, download.iter_raw())) == file["size"]
        # Twelve parts of 5 MB travel at once.
        assert uploaded < 150 * MB, f"{uploaded / MB:.0f} MB for the upload"
        both = process.peak_bytes() - before
        assert both < 150 * MB, f"{both / MB:.0f} MB for both"
