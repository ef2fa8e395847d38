"""`--idle`: what the stack costs while nobody wants anything, what its health checks cost, and what its starts load."""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import yaml

from benchmarks.contenders import Jobstack
from benchmarks.noise import watched
from benchmarks.servers import Bench
from tests.processes import ROOT, Process, running
from tests.servers import free_port
from tests.waiting import until

SETTLE_SECONDS, SECONDS = 15, 60
LOGIN = "user:password"
# What a process imports, and the module whose import is the process's.
ENTRIES = {"api": "app.api.app", "worker": "worker.__main__", "beat": "beat.__main__", "flower": "flower.command"}
CHECKS, IMPORTS, OFFENDERS = 5, 3, 6
Figures = tuple[dict[str, float], dict[str, float]]


@dataclass
class Service:
    name: str


def plan(bench: Bench) -> dict[str, tuple[Callable[[Any], Figures], list[Any]]]:
    return {
        "idle": (lambda _: idle(bench), [Service("jobstack")]),
        "import": (lambda service: imports(service.name), [Service(name) for name in ENTRIES]),
    }


def idle(bench: Bench) -> Figures:
    """CPU of each service in a hundredth of a core, with all of its children; its memory; its health check's CPU."""
    bench.reset()
    processes: dict[str, int] = {}
    flower_port = free_port()
    environment = {"FLOWER_PORT": str(flower_port), "FLOWER_ADDRESS": "127.0.0.1", "FLOWER_BASIC_AUTH": LOGIN}
    with ExitStack() as stack:
        for name, env in (("worker", {}), ("worker-maintenance", {"WORKER_QUEUES": "maintenance"}), ("beat", {})):
            process = running(name.partition("-")[0], bench.folder, alive=name, **env)
            processes[name] = stack.enter_context(process).process.pid
        address = stack.enter_context(Jobstack(bench).api())
        processes["api"] = next(found.pid for found in psutil.Process().children() if "app.api" in found.cmdline())
        flower = Process([sys.executable, "-m", "app.flower"], bench.folder, **environment)
        stack.callback(flower.kill)
        processes["flower"] = flower.process.pid
        until(lambda: _listens(flower_port), f"Flower is up: {flower.log}")
        time.sleep(SETTLE_SECONDS)
        before = {name: _cpu(pid) for name, pid in processes.items()}
        with watched() as noise:
            time.sleep(SECONDS)
        figures = {
            f"{name}, % of a core": (_cpu(pid) - before[name]) / SECONDS * 100 for name, pid in processes.items()
        }
        figures = {"all, % of a core": sum(figures.values()), **figures}
        for name, pid in processes.items():
            figures |= _memory(name, pid)
        environment["JOBSTACK_RUN_DIR"] = str(bench.folder)
        ports = {"api": address.rpartition(":")[2], "flower": str(flower_port)}
        for name in processes:
            queues = {"WORKER_QUEUES": "maintenance"} if name == "worker-maintenance" else {}
            figures[f"{name}: health check, ms CPU"] = _check(
                name, environment | queues | {"PORT": ports.get(name, "")}
            )
    return figures, noise


def _listens(port: int) -> bool:
    return any(found.laddr.port == port for found in psutil.net_connections("tcp") if found.status == "LISTEN")


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _cpu(pid: int) -> float:
    """Seconds so far, of children that ended as well."""
    every = [process.cpu_times() for process in _tree(pid)]
    return float(sum(times.user + times.system + times.children_user + times.children_system for times in every))


def _memory(name: str, pid: int) -> dict[str, float]:
    """RSS counts what children share with their parent for each of them, PSS once (Linux)."""
    rss, pss = 0, 0
    for process in _tree(pid):
        memory = process.memory_full_info()
        rss, pss = rss + memory.rss, pss + getattr(memory, "pss", 0)
    return {f"{name}, MB RSS": rss / 2**20} | ({f"{name}, MB PSS": pss / 2**20} if pss else {})


def _check(name: str, environment: dict[str, str]) -> float:
    """The command in docker-compose.yml, without the container around it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    test = [word.replace("$$", "$") for word in services[name]["healthcheck"]["test"]]
    command = [sys.executable, *test[2:]] if test[:2] == ["CMD", "python"] else test[1:]
    costs = []
    for _ in range(CHECKS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False, capture_output=True)
        if ended.returncode:
            raise RuntimeError(f"{name} is not healthy: {ended.stderr.decode()}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)
    return sorted(costs)[CHECKS // 2]


def imports(service: str) -> Figures:
    """Milliseconds until a process has loaded its modules, and the packages that take most of it."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {ENTRIES[service]}"]
    runs = []
    with watched() as noise:
        for _ in range(IMPORTS):
            shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
            # "import time: self [us] | cumulative | imported package", a package indented by its depth.
            found = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)$", shown, re.MULTILINE)
            runs.append([(int(alone), int(whole), name) for alone, whole, _, name in found])
    run = sorted(runs, key=lambda modules: sum(alone for alone, _, _ in modules))[IMPORTS // 2]
    figures = {"all, ms": sum(alone for alone, _, _ in run) / 1000, "modules": float(len(run))}
    by_package: dict[str, int] = {}
    for alone, _, name in run:
        package = name.partition(".")[0]
        by_package[package] = by_package.get(package, 0) + alone
    for package, alone in sorted(by_package.items(), key=lambda entry: -entry[1])[:OFFENDERS]:
        figures[f"{package}, ms"] = alone / 1000
    return figures, noise
