"""text_report, thumbnail and waveform: stored files, recorded steps and results through the real runner."""

import io
import math
import os
import signal
import wave
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from psycopg.rows import DictRow

from app.settings import Settings
from tests.integration.conftest import QUICK, Jobs
from tests.waiting import until
from worker.handlers import waveform

RunKind = Callable[..., dict[str, Any]]
Upload = Callable[..., str]
ReadFile = Callable[[str], bytes]


def recording(seconds: int) -> bytes:
    """Mono, 8 kHz, 16 bit: a tone of half of full scale; its second second is silent."""
    tone = (np.sin(np.arange(8000) * math.tau / 20) * 16_384).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(tone.tobytes() + bytes(16_000) + tone.tobytes() * (seconds - 2))
    return file.getvalue()


def measured_as_expected(result: dict[str, Any], seconds: int) -> None:
    assert result["duration_seconds"] == seconds
    assert (result["sample_rate"], result["channels"], result["silences"]) == (8000, 1, [[1, 2]])
    assert result["peak_dbfs"] == pytest.approx(-6.02, abs=0.01)
    assert result["rms_dbfs"] == pytest.approx(-9.03 + 10 * math.log10((seconds - 1) / seconds), abs=0.01)


def test_text_report(run_kind: RunKind, upload: Upload) -> None:
    file_id = upload("räuber.txt", "\ufeffDer Wald, der Wald\nund die Räuber’s\n".encode())
    job = run_kind("text_report", {"file_id": file_id, "top": 2})
    assert job["status"] == "succeeded", job["error"]
    assert job["result"] == {
        "characters": 36,
        "words": 7,
        "lines": 2,
        "unique_words": 5,
        "top_words": [["der", 2], ["wald", 2]],
    }


def test_thumbnail(run_kind: RunKind, upload: Upload, read_file: ReadFile, db: psycopg.Connection[DictRow]) -> None:
    photo = io.BytesIO()
    Image.radial_gradient("L").resize((800, 600)).convert("RGB").save(photo, "JPEG")
    file_id = upload("photo.jpg", photo.getvalue(), "image/jpeg")
    job = run_kind("thumbnail", {"file_id": file_id, "width": 200})
    assert job["status"] == "succeeded", job["error"]
    result = job["result"]
    assert (result["width"], result["height"]) == (200, 150)
    small = Image.open(io.BytesIO(read_file(result["file_id"])))
    assert (small.format, small.size) == ("JPEG", (200, 150))
    row = db.execute("SELECT name, content_type FROM files WHERE id = %s", [result["file_id"]]).fetchone()
    assert row == {"name": "thumbnail.jpeg", "content_type": "image/jpeg"}


def test_waveform(run_kind: RunKind, upload: Upload, read_file: ReadFile) -> None:
    job = run_kind("waveform", {"file_id": upload("talk.wav", recording(90)), "chunk_seconds": 10})
    assert job["status"] == "succeeded", job["error"]
    measured_as_expected(job["result"], 90)
    assert job["progress"] == {"current": 9, "total": 9, "message": "chunks measured"}
    assert Image.open(io.BytesIO(read_file(job["result"]["image_file_id"]))).size == (1200, 240)


def test_a_second_attempt_goes_on_behind_the_last_chunk(
    run_kind: RunKind, upload: Upload, db: psycopg.Connection[DictRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = waveform.measured

    def failing_once(sound: Any, number: int, chunk_seconds: int) -> waveform.Chunk:
        measured.append(number)
        if measured.count(6) == 1 and number == 6:
            raise ConnectionError("the storage is away")
        return measure(sound, number, chunk_seconds)

    monkeypatch.setattr(waveform, "measured", failing_once)
    job = run_kind("waveform", {"file_id": upload("talk.wav", recording(10)), "chunk_seconds": 1})
    assert (job["status"], job["error"]["type"]) == ("queued", "ConnectionError")
    job = run_kind("waveform", {}, job_id=job["id"])
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    measured_as_expected(job["result"], 10)
    assert measured == [*range(7), *range(6, 10)]
    steps = db.execute("SELECT name FROM job_steps WHERE job_id = %s ORDER BY name", [job["id"]]).fetchall()
    assert [step["name"] for step in steps] == [*(f"chunk-{n:04d}" for n in range(1, 11)), "file:waveform.png"]


@pytest.mark.parametrize(
    ("kind", "payload", "data", "message"),
    [
        ("text_report", {}, b"caf\xe9", "not UTF-8 text"),
        ("thumbnail", {"width": 10}, b"no picture\0", "not a JPEG"),
        ("waveform", {}, recording(10)[:-1], "incomplete"),
    ],
)
def test_a_bad_file_fails_at_once(
    run_kind: RunKind, upload: Upload, kind: str, payload: dict[str, Any], data: bytes, message: str
) -> None:
    job = run_kind(kind, {"file_id": upload("bad", data), **payload})
    assert (job["status"], job["attempt"], job["error"]["type"]) == ("failed", 1, "PermanentError")
    assert message in job["error"]["message"]


def test_the_job_survives_its_child(
    jobs: Jobs, upload: Upload, start: Callable[..., Any], db: psycopg.Connection[DictRow], settings: Settings
) -> None:
    seconds = 1500

    def chunks_recorded() -> int:
        query = "SELECT count(*) FROM job_steps WHERE job_id = %s AND name LIKE 'chunk-%%'"
        [[count]] = [tuple(row.values()) for row in db.execute(query, [job_id])]
        return int(count)

    start("worker", **QUICK)
    payload = {"file_id": upload("talk.wav", recording(seconds)), "chunk_seconds": 1}
    job_id = jobs.insert("waveform", payload, published_at="now()")
    with psycopg.connect(settings.database_conninfo) as other:
        # Who records this step waits for the end of this transaction.
        other.execute("INSERT INTO job_steps (job_id, name, result) VALUES (%s, 'chunk-0100', 'null')", [job_id])
        jobs.send(job_id)
        until(lambda: chunks_recorded() > 50, "some chunks are measured")
        os.kill(jobs.running(job_id)["pid"], signal.SIGKILL)
        other.rollback()
    assert chunks_recorded() < seconds
    job = jobs.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert chunks_recorded() == seconds
    measured_as_expected(job["result"], seconds)
