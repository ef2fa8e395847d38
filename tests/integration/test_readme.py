"""What the README shows works as it stands there."""

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.jobs import kinds
from tests.processes import ROOT
from tests.waiting import until
from worker import handlers

README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    [found] = [text for text in blocks if containing in text]
    return found


@pytest.fixture
def checksum_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The README's two files, as if they lay in their folders."""
    for package, containing in ((kinds, "KIND = Kind("), (handlers, "def run(")):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "checksum.py").write_text(block("python", containing))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    kinds.all_kinds.cache_clear()
    yield
    kinds.all_kinds.cache_clear()


@pytest.mark.usefixtures("checksum_kind")
def test_two_files_make_a_kind(request: pytest.FixtureRequest, upload: Callable[..., str]) -> None:
    # Asked for here and not in the signature: the runner must see the new kind.
    run_kind: Callable[..., dict[str, Any]] = request.getfixturevalue("run_kind")
    data = b"some bytes" * 100_000
    job = run_kind("checksum", {"file_id": upload("a.bin", data), "rounds": 2})
    assert job["error"] is None
    assert job["result"] == {"sha256": hashlib.sha256(data * 2).hexdigest()}
    assert job["queue"] == "low_priority"
    assert job["progress"] == {"current": 2e6, "total": 2e6, "message": "bytes"}


def test_the_lines_to_paste(api: httpx.Client, start: Callable[..., Any]) -> None:
    start("worker", WEBHOOK_ALLOW_PRIVATE="true")
    lines = block("sh", "API=http").replace("http://127.0.0.1:8000", str(api.base_url).rstrip("/"))
    # Nothing outside is called by a test; port 9 refuses, so this job waits for its retry.
    lines = lines.replace("https://example.com/hook", "http://127.0.0.1:9/hook")
    shell = subprocess.run(["sh", "-eu", "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert shell.stderr == ""

    def over() -> dict[str, Any] | None:
        jobs = {job["kind"]: job for job in api.get("/api/jobs").json()["jobs"]}
        assert len(jobs) == 4
        done = all(job["finished_at"] for kind, job in jobs.items() if kind != "webhook")
        return jobs if done and jobs["webhook"]["error"] else None

    jobs = until(over, "the README's jobs are over")
    assert jobs["text_report"]["result"]["words"] == 5
    assert jobs["thumbnail"]["result"]["width"] == 320
    assert jobs["waveform"]["result"]["channels"] in (1, 2)
    assert jobs["webhook"]["status"] == "queued"
