"""The real processes of the stack, started by tests."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import uvicorn

from app.api.__main__ import Server
from app.api.app import create_app
from app.api.protocol import Protocol
from app.settings import Settings
from tests.servers import free_port
from tests.waiting import until

ROOT = Path(__file__).parent.parent


class Process:
    """A process with its log in a file."""

    def __init__(self, command: list[str], folder: Path, *, cwd: Any = ROOT, **env: object) -> None:
        self.folder = folder
        self.log_path = folder / f"process-{free_port()}.log"
        environment = {**os.environ, "JOBSTACK_RUN_DIR": str(folder), **{k: str(v) for k, v in env.items()}}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        children: list[psutil.Process] = psutil.Process(self.process.pid).children()
        return children

    def peak_bytes(self) -> int:
        """Of resident memory, since its start."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL for the whole tree at once, as a power cut would."""
        try:
            tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def running(module: str, folder: Path, alive: str | None = None, **env: object) -> Iterator[Process]:
    """`python -m MODULE`, once it has shown its first sign of life (the file `alive`); killed at the end."""
    sign = folder / f"jobstack-{alive}.alive"
    sign.unlink(missing_ok=True)
    process = Process([sys.executable, "-m", module], folder, **env)
    try:
        if alive:
            until(lambda: sign.exists() or process.process.poll() is not None, f"{module} is up", seconds=60)
        assert process.process.poll() is None, process.log
        yield process
    finally:
        process.kill()


@contextmanager
def started(name: str, folder: Path, **env: object) -> Iterator[Process]:
    """A process by its name in compose, or "odd" (`tests/integration/odd.py`), in its own folder below `folder`."""
    module, alive = {"worker-maintenance": ("worker", name), "odd": ("tests.integration.odd", "worker")}.get(
        name, (name, name)
    )
    if name == "worker-maintenance":
        env = {"WORKER_QUEUES": "maintenance", **env}
    with running(module, Path(tempfile.mkdtemp(dir=folder)), alive, **env) as process:
        yield process


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The API in a thread of this process, behind a real socket. Yields its address."""
    port = free_port()
    # Connections that a test opened wait for their turn, on a busy machine for long.
    options: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_keep_alive": 60, "http": Protocol}
    server = Server(uvicorn.Config(create_app(settings), port=port, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "the API is up")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)
