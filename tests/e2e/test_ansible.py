"""The playbooks, for real: a host that is this machine, reached by a local connection, with a compose stack on it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import ROOT, Stack
from tests.waiting import until

ANSIBLE = ROOT / "ansible"
Run = Callable[..., "subprocess.CompletedProcess[str]"]
MINE = "a task of mine, that nobody brings back"


def play(playbook: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # By its label alone must the stack's project be found.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
    command = [str(ANSIBLE / "run-playbook.sh"), playbook, *arguments]
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=600)


@pytest.fixture
def host(stack: Stack, tmp_path: Path) -> dict[str, Any]:
    """What the inventory says of the host."""
    folder = tmp_path / "my stack"
    folder.mkdir()
    shutil.copy(ROOT / "docker-compose.yml", folder)
    values = stack.secrets | {"COMPOSE_PROJECT_NAME": stack.project}
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return {"ansible_connection": "local", "jobstack_dir": str(folder)}


@pytest.fixture
def run(host: dict[str, Any], tmp_path: Path) -> Run:
    """run("doctor.yaml", "--check", jobstack_dir="...") -> how it ended."""

    def run_playbook(playbook: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        inventory = tmp_path / "inventory.json"
        inventory.write_text(json.dumps({"jobstack": {"hosts": {"here": host | variables}}}))
        return play(playbook, "--inventory", str(inventory), *arguments)

    return run_playbook


@pytest.fixture
def full_queue(stack: Stack) -> Iterator[Callable[[], list[str]]]:
    """`low_priority` with the messages of three jobs, five copies, and one that is no job's; nobody takes them. Returns
    what is in it."""
    stack.compose("stop", "worker")
    jobs = [stack.create("sleep", {"seconds": 1}, priority="low") for _ in range(3)]
    copy = "for i = 1, 5 do redis.call('lpush', KEYS[1], redis.call('lindex', KEYS[1], -1)) end"
    stack.execute("redis", "redis-cli", "eval", copy, "1", "low_priority")
    stack.execute("redis", "redis-cli", "lpush", "low_priority", MINE)
    yield lambda: stack.execute("redis", "redis-cli", "lrange", "low_priority", "0", "-1").splitlines()
    stack.execute("redis", "redis-cli", "lrem", "low_priority", "0", MINE)
    stack.compose("up", "--detach", "--no-build", "--wait", "worker")
    # Or the next test would find what is left of them in its queue.
    for job in jobs:
        stack.finished(job)
    until(lambda: stack.execute("redis", "redis-cli", "llen", "low_priority").strip() == "0", "the queue is empty")


def test_the_doctor_looks_and_changes_nothing(run: Run) -> None:
    for arguments in ([], ["--check"]):
        done = run("doctor.yaml", *arguments)
        assert done.returncode == 0, done
        assert "0 problems" in done.stdout
        assert "changed=0" in done.stdout


def test_what_is_wrong_fails_its_host(run: Run, full_queue: object) -> None:
    for arguments in ([], ["--check"]):
        done = run("doctor.yaml", *arguments, jobstack_service="worker-maintenance")
        assert done.returncode == 2, done
        assert "no worker that answers consumes it" in done.stdout
        assert "It found problems, above." in done.stdout
    # The default: its container is stopped.
    done = run("doctor.yaml")
    assert done.returncode == 2, done
    assert "It could not do its work" in done.stdout
    done = run("doctor.yaml", jobstack_dir="/nowhere")
    assert done.returncode == 2, done
    assert "It could not do its work" in done.stdout
    done = run("purge_celery_duplicates.yaml", "--check")
    assert done.returncode == 2, done
    assert "It could not do its work" in done.stdout


def test_queues_are_purged(run: Run, full_queue: Callable[[], list[str]]) -> None:
    there = {"jobstack_service": "worker-maintenance"}
    before = full_queue()
    assert MINE in before
    done = run("purge_celery_queue.yaml", **there)
    assert done.returncode == 2, done
    assert "Say which queues" in done.stdout
    done = run("purge_celery_queue.yaml", "--check", "-e", "queues=low_priority", **there)
    assert done.returncode == 0, done
    assert "Would purge 9 messages of low_priority" in done.stdout
    assert "1 not readable" in done.stdout
    assert "changed=1" in done.stdout
    assert full_queue() == before
    done = run("purge_celery_queue.yaml", "-e", "queues=low_priority", **there)
    assert done.returncode == 0, done
    assert "Purged 9 messages; 3 jobs come back." in done.stdout
    assert "changed=1" in done.stdout
    assert MINE not in full_queue()
    done = run("purge_celery_queue.yaml", "-e", "queues=high_priority", **there)
    assert done.returncode == 0, done
    assert "changed=0" in done.stdout
    done = run("purge_celery_queue.yaml", "-e", "queues=no_such_queue", **there)
    assert done.returncode == 2, done
    assert "There is no queue" in done.stdout


def test_duplicates_are_removed(run: Run, full_queue: Callable[[], list[str]]) -> None:
    there = {"jobstack_service": "worker-maintenance"}
    before = full_queue()
    done = run("purge_celery_duplicates.yaml", "--check", **there)
    assert done.returncode == 0, done
    assert "low_priority: 5 duplicates" in done.stdout
    assert full_queue() == before
    for changed in (1, 0):
        done = run("purge_celery_duplicates.yaml", "-e", "queues=low_priority", **there)
        assert done.returncode == 0, done
        assert f"changed={changed}" in done.stdout
    assert sorted(full_queue()) == sorted(set(before))
    done = run("purge_celery_duplicates.yaml", "-e", '{"queues": "default; exit 0"}', **there)
    assert done.returncode == 2, done
    assert "Say which queues" in done.stdout


def test_no_host_is_no_success(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.json"
    for text in (None, '{"others": {"hosts": {"here": {"ansible_connection": "local"}}}}'):
        if text:
            inventory.write_text(text)
        done = play("doctor.yaml", "--inventory", str(inventory))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert "No host matches" in done.stderr


def test_they_are_clean(run: Run) -> None:
    assert run("doctor.yaml", "--list-tasks").returncode == 0  # installs it
    programs = ANSIBLE / ".venv" / "bin"
    # It looks at the syntax with Ansible itself, which refuses to go on without an inventory.
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "ANSIBLE_INVENTORY": "inventory.example.yaml"}

    def call(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=ANSIBLE, env=env, check=False, capture_output=True, text=True, timeout=300)

    done = call("ansible-lint", "--strict")
    assert done.returncode == 0, done
    done = call("ansible-inventory", "--inventory", "inventory.example.yaml", "--list")
    assert done.returncode == 0, done
    hosts = json.loads(done.stdout)["_meta"]["hostvars"]
    assert {name: found["jobstack_dir"] for name, found in hosts.items()} == {
        "jobs1.example.com": "/opt/jobstack",
        "jobs2.example.com": "/srv/jobs",
        "jobs3.example.com": r"C:\jobstack",
    }
    assert hosts["jobs3.example.com"]["ansible_connection"] == "winrm"
