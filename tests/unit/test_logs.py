"""Log lines: ours and the standard library's in one format, and each of them whole."""

import json
import os
import subprocess
import sys
from typing import Any

HEAD = """
import logging, os, sys, threading
import structlog
from app import logs
logs.configure()
log = logs.get("test")
"""


def lines_of(code: str, **env: str) -> list[str]:
    """What a process with this configuration prints; nothing may go to stderr."""
    servers = {"DATABASE_URL": "postgresql://nobody@localhost/none", "REDIS_URL": "redis://localhost"}
    environment = {**os.environ, **servers, "LOG_LEVEL": "INFO", **env}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def parsed(code: str, **env: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(code, LOG_FORMAT="json", **env)]


def test_a_line_of_ours() -> None:
    [line] = parsed(
        """
structlog.contextvars.bind_contextvars(request_id="r-1")
log.debug("too fine")
log.info("job_ended", status="succeeded", odd=b"\\x00", text="ü\\nü\\ud800")
"""
    )
    assert list(line) == ["status", "odd", "text", "request_id", "level", "timestamp", "message"]
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "status": "succeeded",
        "odd": "b'\\x00'",
        "text": "ü\nü\ud800",
        "request_id": "r-1",
        "level": "info",
        "message": "job_ended",
    }


def test_a_value_that_json_does_not_have_ends_nobodys_work() -> None:
    [line] = parsed('log.info("odd", ratio=float("nan"), counts={(1, 2): 3})')
    assert (line["message"], line["ratio"], line["counts"]) == ("odd", "nan", "{(1, 2): 3}")


def test_a_stream_that_is_no_file_ends_nobodys_work() -> None:
    [line] = parsed(
        """
import io
logs.configure(io.StringIO())
logs.get("other").info("still here")
"""
    )
    assert line["message"] == "still here"


def test_a_line_of_the_standard_library() -> None:
    [line] = parsed('logging.getLogger("some.library").warning("%s is full", "it", extra={"room": 0})')
    assert line.pop("timestamp").endswith("Z")
    assert line == {"message": "it is full", "level": "warning", "logger": "some.library", "room": 0}


def test_an_exception_has_its_traceback_in_the_same_line() -> None:
    code = """
try:
    1 / 0
except ZeroDivisionError:
    log.exception("mistake")
    logging.getLogger("library").exception("mistake")
"""
    for line in parsed(code, LOG_LEVEL="ERROR"):
        assert (line["level"], line["message"]) == ("error", "mistake")
        assert line["exception"].startswith("Traceback")


def test_lines_of_threads_and_children_stay_whole() -> None:
    """Children are forked while threads are in the middle of a line."""
    lines = parsed(
        """
def write(number):
    for _ in range(300):
        log.info("ours", number=number, fill="x" * 2000)
        logging.getLogger("library").warning("theirs")

def write_in_threads():
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads: thread.start()
    return threads

threads = write_in_threads()
children = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        for thread in write_in_threads(): thread.join()
        os._exit(0)
    children.append(pid)
for thread in threads: thread.join()
for pid in children: assert os.waitpid(pid, 0)[1] == 0
"""
    )
    # Three threads in each of four processes.
    assert [line["message"] for line in lines].count("ours") == 300 * 3 * 4
    assert [line["message"] for line in lines].count("theirs") == 300 * 3 * 4


def test_nobody_reads_and_the_work_goes_on() -> None:
    assert lines_of('os.close(1); log.info("lost"); os._exit(0)') == []


def test_for_people() -> None:
    ours, theirs = lines_of('log.info("ours", n=1); logging.getLogger("library").info("theirs")', LOG_FORMAT="console")
    assert "ours" in ours
    assert "theirs" in theirs
    assert not {*ours, *theirs} & {"{", '"'}
