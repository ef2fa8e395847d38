"""The checks that run every 30 s in each container: what they say, and that they import next to nothing."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def check(module: str, **env: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in env.items()}}
    command = [sys.executable, "-m", module]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def api_that_says(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_api() -> None:
    with api_that_says(200) as port:
        assert check("app.api.health", PORT=port).returncode == 0
    with api_that_says(503) as port:
        done = check("app.api.health", PORT=port)
    assert (done.returncode, done.stderr) == (1, "the API answers 'HTTP/1.1 503 Service Unavailable'\n")
    done = check("app.api.health", PORT=free_port())
    assert done.returncode == 1
    assert done.stderr.startswith("the API does not answer: ")


@pytest.mark.parametrize("module", ["beat.health", "worker.health"])
def test_signs_of_life(module: str, tmp_path: Path) -> None:
    done = check(module, JOBSTACK_RUN_DIR=tmp_path)
    assert done.returncode == 1
    assert "not given a sign of life yet" in done.stderr
    process = module.partition(".")[0]
    touch = f"from app import alive; alive.touch('{process}')"
    for _ in range(2):  # the file is made, and made new
        subprocess.run([sys.executable, "-c", touch], cwd=ROOT, env={"JOBSTACK_RUN_DIR": str(tmp_path)}, check=True)
        assert check(module, JOBSTACK_RUN_DIR=tmp_path).returncode == 0
        [file] = tmp_path.iterdir()
        os.utime(file, (0, 0))
    done = check(module, JOBSTACK_RUN_DIR=tmp_path)
    assert done.returncode == 1
    assert "30 s are allowed" in done.stderr


@pytest.mark.parametrize("module", ["app.api.health", "beat.health", "worker.health"])
def test_they_import_nothing_heavy(module: str) -> None:
    code = f"""
import runpy, sys
try:
    runpy.run_module("{module}", run_name="__main__")
finally:
    print(*sys.modules)
"""
    # -S: what this installation imports at every start is not the check's doing.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    loaded = set(done.stdout.split())
    assert module.partition(".")[0] in loaded
    assert not loaded & {"pathlib", "tempfile", "http", "urllib", "ssl", "logging", "asyncio", "pydantic", "celery"}
