"""The stack's containers, and what can be done to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker


class Container:
    """One container. What it does to itself (a restart by its policy) shows after `reload`."""

    def __init__(self, found: Any, project: str) -> None:
        self._docker, self._project = found, project

    @property
    def service(self) -> str:
        service: str = self._docker.labels["com.docker.compose.service"]
        return service

    @property
    def host(self) -> str:
        """Its host name, which is also the end of its worker's name: `worker@HOST`."""
        host: str = self._docker.attrs["Config"]["Hostname"]
        return host

    @property
    def command(self) -> list[str]:
        """What it runs."""
        command: list[str] = self._docker.attrs["Config"]["Cmd"]
        return command

    @property
    def state(self) -> dict[str, Any]:
        """Docker's, now: Status, ExitCode, StartedAt ..."""
        self._docker.reload()
        state: dict[str, Any] = self._docker.attrs["State"]
        return state

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as a power cut. No restart policy brings it back."""
        self._docker.kill("SIGKILL")

    def start(self) -> None:
        self._docker.start()

    def stop(self, seconds: int = 75) -> None:
        """SIGTERM, and SIGKILL after `seconds`, which compose grants as well."""
        self._docker.stop(timeout=seconds)

    def restart(self, seconds: int = 60) -> None:
        self._docker.restart(timeout=seconds)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No process in it runs, while its kernel still takes what is sent."""
        self._docker.pause()
        try:
            yield
        finally:
            if self.state["Status"] == "paused":  # or somebody killed it meanwhile
                self._docker.unpause()

    @contextmanager
    def cut_off(self, network: str) -> Iterator[None]:
        """Off a network without a word: no packet goes out or comes in, and nobody is told."""
        wire = self._docker.client.networks.get(f"{self._project}_{network}")
        wire.disconnect(self._docker)
        try:
            yield
        finally:
            # With the service's name again, as compose does it.
            wire.connect(self._docker, aliases=[self.service])

    def try_run(self, *command: str, **environment: str) -> tuple[int, str]:
        """A command in it: exit code, and what it printed."""
        code, output = self._docker.exec_run(list(command), environment=environment)
        return code, output.decode()

    def run(self, *command: str) -> str:
        """What a command in it printed. It must succeed."""
        code, text = self.try_run(*command)
        assert code == 0, f"{command} in {self.service}: exit code {code}: {text}"
        return text

    def kill_process(self, pid: int) -> None:
        self.run("sh", "-c", f"kill -9 {pid}")

    def memory(self) -> int:
        """Bytes that its processes hold; the kernel's cache of files is not among them."""
        stats = self._docker.stats(stream=False)["memory_stats"]
        used: int = stats["usage"] - stats["stats"].get("inactive_file", 0)
        return used

    def heal(self) -> None:
        """Running, whatever was done to it."""
        status = self.state["Status"]
        if status == "paused":
            self._docker.unpause()
        elif status not in ("running", "restarting"):
            self._docker.start()


def containers(project: str, *services: str) -> list[Container]:
    """The project's containers, of these services or of all; stopped ones too, `migrate` and scripts not."""
    client = docker.from_env()
    labels = [f"com.docker.compose.project={project}", "com.docker.compose.oneoff=False"]
    found = client.containers.list(all=True, filters={"label": labels}, ignore_removed=True)
    ours = [Container(container, project) for container in found]
    return [c for c in ours if (c.service in services if services else c.service != "migrate")]
