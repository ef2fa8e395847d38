"""`ansible/run-playbook.sh`: what it passes on. The playbooks themselves: tests/e2e/test_ansible.py."""

import os
import subprocess
from pathlib import Path

import pytest

ANSIBLE = Path(__file__).parents[2] / "ansible"


def run(
    folder: Path, *arguments: str, system: str = "Linux", hosts: str = "echo 'hosts (1):'"
) -> "subprocess.CompletedProcess[str]":
    """With an `ansible-playbook` that says with what it was called; `hosts` is how it lists them."""
    for name, text in {
        "uname": f"echo {system}",
        "ansible-playbook": f"""case "$*" in *--list-hosts*) {hosts}; exit; esac
            echo "$@"; env | grep -E "^(OBJC|no_proxy|ANSIBLE)" | sort""",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in ("no_proxy", "ANSIBLE_CONFIG")}
    env["PATH"] = f"{folder}:{env['PATH']}"
    command = [str(ANSIBLE / "run-playbook.sh"), *arguments]
    return subprocess.run(command, env=env, cwd=folder, check=False, capture_output=True, text=True)


def test_the_playbook_is_found_from_anywhere(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor.yaml", "--limit", "a b")
    assert done.stdout.splitlines() == [f"{ANSIBLE}/doctor.yaml --limit a b", f"ANSIBLE_CONFIG={ANSIBLE}/ansible.cfg"]


def test_macos_may_fork(tmp_path: Path) -> None:
    said = run(tmp_path, "doctor.yaml", system="Darwin").stdout.splitlines()
    assert {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY=YES", "no_proxy=*"} <= set(said)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, "run-playbook.sh doctor.yaml" in done.stdout) == (0, True)


def test_a_playbook_that_is_none(tmp_path: Path) -> None:
    done = run(tmp_path, "doktor.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "doctor.yaml purge_celery_duplicates.yaml purge_celery_queue.yaml" in done.stderr


@pytest.mark.parametrize("hosts", ["echo 'hosts (0):'", "echo '[ERROR]: No inventory was parsed,' >&2; exit 1"])
def test_no_host_is_no_success(tmp_path: Path, hosts: str) -> None:
    done = run(tmp_path, "doctor.yaml", hosts=hosts)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("No host matches")


def test_why_hosts_cannot_be_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor.yaml", hosts="echo 'no such option' >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "no such option\n")
