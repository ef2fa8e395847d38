"""A stack of containers of its own, driven as its users drive it: by the docker command line and over HTTP."""

import json
import os
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

import httpx

from tests.servers import free_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
OURS = ("api", "worker", "worker-maintenance", "beat", "flower")
FINAL = ("succeeded", "failed", "cancelled")


class Api:
    """The API from outside. Whoever derives from it makes `http`."""

    http: httpx.Client

    def upload(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """The new file's id."""
        answer = self.http.post("/api/files", files={"file": (name, data, content_type)}, timeout=60)
        assert answer.status_code == 201, answer.text
        file_id: str = answer.json()["id"]
        return file_id

    def create(self, kind: str, payload: dict[str, Any], **fields: Any) -> str:
        """The new job's id."""
        answer = self.http.post("/api/jobs", json={"kind": kind, "payload": payload, **fields})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def finished(self, job_id: str, *, seconds: float = 60) -> dict[str, Any]:
        """The job, once it has a final status."""

        def final() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in FINAL else None

        job = until(final, f"job {job_id} ends", seconds=seconds)
        assert job is not None
        return job


class Stack(Api):
    """One compose project with generated names, ports and secrets; never the `.env` of whoever runs the tests."""

    def __init__(self, folder: Path, *, root: Path = ROOT, files: tuple[str, ...] = (), **env: str) -> None:
        self.project = f"jobstack-e2e-{secrets.token_hex(3)}"
        self.secrets = {
            "POSTGRES_PASSWORD": secrets.token_hex(16),
            "REDIS_PASSWORD": secrets.token_hex(16),
            "FLOWER_BASIC_AUTH": f"admin:{secrets.token_hex(16)}",
            "API_KEYS": f"e2e:{secrets.token_hex(16)}",
        }
        self.api_port, self.flower_port = free_port(), free_port()
        values = self.secrets | {"API_PORT": self.api_port, "FLOWER_PORT": self.flower_port} | env
        env_file = folder / f"{self.project}.env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self._command = [
            "docker",
            "compose",
            "--ansi",
            "never",
            "--project-name",
            self.project,
            "--env-file",
            str(env_file),
        ]
        self._command += ["--project-directory", str(root)]
        for file in ("docker-compose.yml", *files):
            self._command += ["--file", str(root / file)]
        # Not the caller's whole environment: a variable there beats the file.
        passed = re.compile("PATH|HOME|DOCKER_.*|BUILDKIT_.*|SSL_.*|XDG_.*")
        self.environment = {name: value for name, value in os.environ.items() if passed.fullmatch(name)}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=10)

    def compose(self, *arguments: str, seconds: float = 300) -> str:
        """What `docker compose ARGUMENTS` printed. It must succeed."""
        done = subprocess.run(
            [*self._command, *arguments],
            check=False,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def watch(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*self._command, "watch", "--no-up"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def up(self, *services: str) -> None:
        try:
            self.compose("up", "--detach", "--build", "--wait", "--wait-timeout", "180", *services, seconds=600)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--tail', '30')}") from None

    def down(self) -> None:
        self.http.close()
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", "--rmi", "local")
        # And the images that a later build took the name of.
        label = f"label=com.docker.compose.project={self.project}"
        subprocess.run(["docker", "image", "prune", "--force", "--filter", label], check=False, capture_output=True)

    def execute(self, service: str, *command: str) -> str:
        return self.compose("exec", "--no-TTY", service, *command)

    def sql(self, statement: str) -> list[Any]:
        """Each row as a dict, read past the API."""
        wrapped = f"SELECT to_json(r) FROM ({statement}) r"
        psql = ("psql", "--username=jobstack", "--no-align", "--tuples-only", "--command", wrapped)
        return [json.loads(line) for line in self.execute("postgres", *psql).splitlines()]

    def inspect(self, service: str) -> Any:
        [container] = self.compose("ps", "--all", "--quiet", service).split()
        output = subprocess.run(["docker", "inspect", container], check=True, capture_output=True).stdout
        return json.loads(output)[0]

    def logs(self, *services: str) -> str:
        # Some releases clear the line before each, even where it goes to no terminal.
        return self.compose("logs", "--no-color", "--no-log-prefix", *services).replace("\x1b[2K", "")
