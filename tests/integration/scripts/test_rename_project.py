"""`rename_project.py`: the new name is everywhere, and the tests pass."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import ROOT

Rename = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of this folder as they are, committed."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "as it was"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def rename(clone: Path) -> Rename:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "scripts/rename_project.py", *arguments]
        return subprocess.run(command, cwd=clone, check=False, capture_output=True, text=True)

    return run


def test_the_new_name_is_everywhere_and_the_tests_pass(clone: Path, rename: Rename) -> None:
    assert rename("acme-jobs", "--dry-run").returncode == 1
    assert rename("acme-jobs").returncode == 2  # nobody can be asked
    done = rename("acme-jobs", "--yes")
    assert done.returncode == 0, done
    left = subprocess.run(["git", "grep", "-il", "jobstack"], cwd=clone, check=False, capture_output=True, text=True)
    assert left.stdout == ""
    assert "ACME_JOBS_RUN_DIR" in (clone / "app/alive.py").read_text()
    tests = ["tests/unit/test_settings.py", "tests/unit/test_containers.py", "tests/unit/test_stack_environment.py"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=clone,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert rename("other_name").returncode == 2  # changes that are not committed


@pytest.mark.parametrize("name", ["", "9lives", "Ärger", "a", "x" * 40, "jobstack"])
def test_a_name_that_cannot_be_one(rename: Rename, name: str) -> None:
    done = rename(name)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_outside_of_a_clone(clone: Path, rename: Rename) -> None:
    shutil.rmtree(clone / ".git")
    done = rename("acme")
    assert done.returncode == 2
    assert "not a git clone" in done.stderr
