"""A production host: the two compose files together, driven over HTTPS and by the scripts that its operator has."""

import ssl
import subprocess
from pathlib import Path

import httpx

from tests.e2e.stack import ROOT, Stack
from tests.servers import free_port

FILES = ("docker-compose.yml", "docker-compose.prod.yml")
EVERYTHING = ("caddy", "worker", "worker-maintenance", "beat", "flower")


class Host(Stack):
    def __init__(self, folder: Path) -> None:
        self.http_port, self.https_port = free_port(), free_port()
        super().__init__(
            folder,
            files=FILES[1:],
            # For which Caddy is its own authority.
            DOMAIN="localhost",
            HTTP_PORT=str(self.http_port),
            HTTPS_PORT=str(self.https_port),
            # A long job is handed back after half of it.
            SHUTDOWN_GRACE_SECONDS="10",
        )
        self.environment |= {
            "COMPOSE_FILE": ":".join(FILES),
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_ENV_FILES": str(folder / f"{self.project}.env"),
        }

    def up(self, *services: str) -> None:
        super().up(*services or EVERYTHING)
        self.http.close()
        self.http = self.client()

    def client(self) -> httpx.Client:
        """With the key, and sure of whom it talks to."""
        root = self.execute("caddy", "cat", "/data/caddy/pki/authorities/local/root.crt")
        key = self.secrets["API_KEYS"].partition(":")[2]
        return httpx.Client(
            base_url=f"https://localhost:{self.https_port}",
            verify=ssl.create_default_context(cadata=root),
            headers={"Authorization": f"Bearer {key}"},
            timeout=10,
        )

    def begin(self, name: str, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        """In a group of its own, as a terminal does it, for a ctrl-C."""
        return subprocess.Popen(
            [str(ROOT / "scripts" / name), *arguments],
            env=self.environment | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def script(self, name: str, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        with self.begin(name, *arguments, **env) as process:
            said, failed = process.communicate(timeout=400)
        return subprocess.CompletedProcess([name], process.returncode, said, failed)

    def containers(self, service: str) -> set[str]:
        """Those that ended too."""
        return set(self.compose("ps", "--all", "--quiet", service).split())
