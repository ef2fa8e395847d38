"""The whole stack, seen from outside: what is promised of it, from the first job to pulled plugs."""

import io
import json
import math
import struct
import time
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.stack import OURS, Stack
from tests.waiting import until

Say = Callable[[str], None]

# ---- the containers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", [*OURS, "postgres", "redis"])
def test_a_container_may_do_very_little(stack: Stack, service: str) -> None:
    container = stack.inspect(service)
    host = container["HostConfig"]
    assert container["State"]["Health"]["Status"] == "healthy"
    assert host["ReadonlyRootfs"]
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["Memory"] > 0
    assert host["NanoCpus"] > 0
    assert host["PidsLimit"] > 0
    status = stack.execute(service, "cat", "/proc/1/status").splitlines()
    seen = {name: value.split() for name, value in (line.split(":", 1) for line in status)}
    assert "0" not in seen["Uid"] + seen["Gid"]
    assert set(seen["CapEff"] + seen["CapBnd"]) == {"0" * 16}
    assert seen["NoNewPrivs"] == ["1"]


@pytest.mark.parametrize("service", OURS)
def test_our_images_run_as_one_user_and_carry_no_installer(stack: Stack, service: str) -> None:
    assert stack.inspect(service)["Config"]["User"] == "10001:10001"
    code = "import sys, importlib.util as u; print(u.find_spec('pip'), u.find_spec('pytest'))"
    assert stack.execute(service, "python", "-c", code).split() == ["None", "None"]


def test_the_api_s_image_has_none_of_the_handlers_libraries(stack: Stack) -> None:
    code = "import importlib.util as u; print(*(u.find_spec(n) for n in ('PIL', 'numpy', 'httpx', 'worker')))"
    assert stack.execute("api", "python", "-c", code).split() == ["None"] * 4


def test_only_api_and_flower_are_published_and_only_on_loopback(stack: Stack) -> None:
    published = {}
    for service in (*OURS, "postgres", "redis"):
        for bindings in stack.inspect(service)["NetworkSettings"]["Ports"].values():
            for binding in bindings or []:
                published[service] = (binding["HostIp"], int(binding["HostPort"]))
    assert published == {"api": ("127.0.0.1", stack.api_port), "flower": ("127.0.0.1", stack.flower_port)}


def test_the_servers_have_no_way_out(stack: Stack) -> None:
    assert list(stack.inspect("redis")["NetworkSettings"]["Networks"]) == [f"{stack.project}_inner"]
    assert list(stack.inspect("postgres")["NetworkSettings"]["Networks"]) == [f"{stack.project}_inner"]


def test_redis_wants_its_password_and_never_evicts(stack: Stack) -> None:
    assert "NOAUTH" in stack.execute("redis", "sh", "-c", "REDISCLI_AUTH= redis-cli ping")
    settings = stack.execute("redis", "redis-cli", "config", "get", "maxmemory*", "appendonly").split()
    found = dict(zip(settings[::2], settings[1::2], strict=True))
    assert found["maxmemory-policy"] == "noeviction"
    assert found["appendonly"] == "yes"
    assert int(found["maxmemory"]) == 256 * 1024**2
    # Neither the command nor the check shows it, here or to whoever lists processes.
    config = stack.inspect("redis")["Config"]
    shown = json.dumps([config["Cmd"], config["Healthcheck"]]) + stack.execute("redis", "cat", "/proc/1/cmdline")
    assert stack.secrets["REDIS_PASSWORD"] not in shown


def test_flower_wants_its_password(stack: Stack) -> None:
    url = f"http://127.0.0.1:{stack.flower_port}/api/workers"
    user, password = stack.secrets["FLOWER_BASIC_AUTH"].split(":")
    assert httpx.get(url, timeout=10).status_code == 401
    assert httpx.get(url, timeout=10, auth=(user, password)).status_code == 200


def test_ready_means_that_each_part_answers(stack: Stack) -> None:
    answer = stack.http.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"


# ---- the kinds -----------------------------------------------------------------------------------------------------


def a_recording(seconds: int, rate: int = 8000) -> bytes:
    """A WAV file, mono, 16 bit: a tone at half of full scale, and silence in every tenth second."""
    tone = b"".join(struct.pack("<h", round(16383 * math.sin(2 * math.pi * 440 * i / rate))) for i in range(rate))
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(rate)
        for second in range(seconds):
            recording.writeframes(bytes(len(tone)) if second % 10 == 9 else tone)
    return file.getvalue()


def test_text_report(stack: Stack) -> None:
    file = stack.upload("notes.txt", "Don't panic.\nDon’t panic twice.\n".encode(), "text/plain")
    job = stack.finished(stack.create("text_report", {"file_id": file, "top": 1}))
    assert job["status"] == "succeeded"
    assert (job["result"]["words"], job["result"]["lines"], job["result"]["top_words"]) == (5, 2, [["panic", 2]])


def test_thumbnail(stack: Stack) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (800, 600), "teal").save(picture, "PNG")
    file = stack.upload("teal.png", picture.getvalue(), "image/png")
    job = stack.finished(stack.create("thumbnail", {"file_id": file, "width": 200}))
    assert job["status"] == "succeeded", job["error"]
    content = stack.http.get(f"/api/files/{job['result']['file_id']}/content")
    with Image.open(io.BytesIO(content.content)) as small:
        assert (small.format, small.size) == ("PNG", (200, 150))


def test_waveform(stack: Stack) -> None:
    file = stack.upload("tone.wav", a_recording(20), "audio/wav")
    job = stack.finished(stack.create("waveform", {"file_id": file, "chunk_seconds": 3}))
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["duration_seconds"] == 20
    assert job["result"]["peak_dbfs"] == pytest.approx(-6.02, abs=0.01)
    assert job["result"]["silences"] == [[9, 10], [19, 20]]
    content = stack.http.get(f"/api/files/{job['result']['image_file_id']}/content")
    with Image.open(io.BytesIO(content.content)) as drawing:
        drawing.verify()


def test_webhook(stack: Stack) -> None:
    body = {"paid": True}
    job_id = stack.create("webhook", {"url": "http://receiver:8080/e2e", "body": body})
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert job["result"] == {"status": 200, "body": "thanks"}
    calls = [json.loads(line) for line in stack.logs("receiver").splitlines()]
    # Refused once, then taken; both attempts can be told to be the same.
    assert calls == [{"path": "/e2e", "key": job_id, "body": body}] * 2


def test_what_is_set_outside_reaches_the_processes(stack: Stack) -> None:
    environment = stack.execute("worker", "printenv").splitlines()
    assert "WEBHOOK_ALLOW_PRIVATE=true" in environment
    # And what is not set stays unset, so that the code's default holds.
    assert not [line for line in environment if line.startswith("JOB_LEASE_SECONDS")]


def test_scripts_run_in_the_worker_s_container(stack: Stack) -> None:
    script = ("python", "scripts/run_job.py", "sleep", "--payload", '{"seconds": 0}', "--json")
    assert json.loads(stack.execute("worker", *script))["ok"] is True


# ---- pulled plugs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("away", "back"), [("pause", "unpause"), ("stop", "start")])
def test_jobs_are_accepted_while_redis_is_away(stack: Stack, say: Say, away: str, back: str) -> None:
    seconds, per_second = 20, 20

    def post(number: int) -> tuple[float, str]:
        time.sleep(max(0.0, began + number / per_second - time.monotonic()))
        start = time.monotonic()
        job_id = stack.create("sleep", {"seconds": 0})
        return time.monotonic() - start, job_id

    with ThreadPoolExecutor(per_second) as pool:
        # As a caller who keeps its connections: what is measured is the API.
        list(pool.map(lambda _: stack.http.get("/health/live"), range(per_second)))
        stack.compose(away, "redis")
        try:
            began = time.monotonic()
            answers = list(pool.map(post, range(seconds * per_second)))
        finally:
            stack.compose(back, "redis")
    returned = time.monotonic()
    took = sorted(duration for duration, _ in answers)
    p99 = took[len(took) * 99 // 100]
    say(
        f"redis {away}: {len(took)} jobs accepted, p50 {took[len(took) // 2] * 1e3:.0f} ms, "
        f"p99 {p99 * 1e3:.0f} ms, slowest {took[-1] * 1e3:.0f} ms"
    )
    assert p99 < 1
    assert took[-1] < 5  # one of 400 may wait for this machine

    waiting = {job_id for _, job_id in answers}
    unfinished = "SELECT count(*) FROM jobs WHERE kind = 'sleep' AND status <> 'succeeded'"
    until(lambda: stack.sql(unfinished) == [{"count": 0}], "all are done", seconds=60)
    say(f"redis {back}: all done {time.monotonic() - returned:.1f} s later")
    # Messages may have been doubled; the work was not.
    rows = stack.sql("SELECT id, attempt FROM jobs WHERE kind = 'sleep'")
    assert {row["id"] for row in rows if row["attempt"] == 1} >= waiting


@pytest.fixture(scope="module")
def long_recording(stack: Stack) -> str:
    """The id of two hours of sound, which take a while even for a computer."""
    return stack.upload("long.wav", a_recording(7200), "audio/wav")


def in_the_middle(stack: Stack, job_id: str) -> dict[str, Any]:
    """Waits until the job has done some chunks. Returns its row."""

    def row() -> dict[str, Any] | None:
        [row] = stack.sql(
            f"SELECT status, pid, (SELECT count(*) FROM job_steps WHERE job_id = id) AS steps FROM jobs "
            f"WHERE id = '{job_id}'"
        )
        assert row["status"] in ("queued", "running"), "the job ended before it could be interrupted"
        return row if row["steps"] >= 3 else None

    found = until(row, "some chunks are done", seconds=60)
    assert found is not None
    return found


def steps(stack: Stack, job_id: str) -> dict[str, str]:
    rows = stack.sql(f"SELECT name, created_at FROM job_steps WHERE job_id = '{job_id}'")
    return {row["name"]: row["created_at"] for row in rows}


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_kill_9_in_the_middle_of_a_long_job(stack: Stack, say: Say, long_recording: str, victim: str) -> None:
    job_id = stack.create("waveform", {"file_id": long_recording, "chunk_seconds": 5})
    child = in_the_middle(stack, job_id)["pid"]
    # Process 1 is the init; its only child is the worker's parent. With that, the container ends and starts again.
    find = f"echo {child}" if victim == "child" else "cat /proc/1/task/1/children"
    restarts = stack.inspect("worker")["RestartCount"]
    stack.execute("worker", "sh", "-c", f"kill -9 $({find})")
    killed = time.monotonic()
    done = steps(stack, job_id)
    until(lambda: stack.job(job_id)["attempt"] == 2, "it runs again", seconds=60)
    again = time.monotonic() - killed
    say(f"kill -9 of the {victim}: {len(done)} chunks were done, it ran again after {again:.1f} s")
    assert again < (10 if victim == "child" else 45)

    job = stack.finished(job_id, seconds=180)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    assert job["result"]["duration_seconds"] == 7200
    # What was done before is the same row as before.
    after = steps(stack, job_id)
    assert done.items() <= after.items()
    assert len(after) > len(done)
    [attempts] = stack.sql(f"SELECT count(*) FROM job_attempts WHERE job_id = '{job_id}'")
    assert attempts["count"] == 1
    assert (stack.inspect("worker")["RestartCount"] > restarts) == (victim == "worker")


def test_a_deploy_finishes_short_jobs_and_hands_back_long_ones(stack: Stack, say: Say) -> None:
    until(lambda: stack.inspect("worker")["State"]["Health"]["Status"] == "healthy", "the worker is back")
    long = stack.create("sleep", {"seconds": 3600, "steps": 1000})
    short = stack.create("sleep", {"seconds": 8})
    until(lambda: all(stack.job(job)["status"] == "running" for job in (long, short)), "both run")
    began = time.monotonic()
    stack.compose("stop", "worker")
    took = time.monotonic() - began
    say(f"SIGTERM: the worker ended after {took:.1f} s")
    state = stack.inspect("worker")["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert took < 75

    assert stack.job(short)["status"] == "succeeded"
    handed_back = stack.job(long)
    assert (handed_back["status"], handed_back["attempt"], handed_back["error"]) == ("queued", 0, None)

    stack.compose("start", "worker")
    until(lambda: stack.job(long)["status"] == "running", "the long one runs again")
    assert stack.job(long)["attempt"] == 1
    assert stack.http.post(f"/api/jobs/{long}/cancel").status_code == 202
    assert stack.finished(long)["status"] == "cancelled"


# ---- afterwards ----------------------------------------------------------------------------------------------------


def test_logs_are_json_and_hold_no_secret(stack: Stack) -> None:
    everything = stack.logs()
    for name, secret in stack.secrets.items():
        assert secret.rpartition(":")[2] not in everything, f"{name} is in a log"
    for line in filter(None, stack.logs("api", "worker", "worker-maintenance", "beat", "flower").splitlines()):
        record = json.loads(line)
        assert {"level", "message"} <= record.keys(), line
