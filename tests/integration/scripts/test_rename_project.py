"""`rename_project.py`: the new name is everywhere, and the tests pass."""

import os
import re
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_new_name_is_everywhere_and_the_tests_pass(clone: Path, rename: Rename) -> None:
    assert rename("acme-jobs", "--dry-run").returncode == 1
    assert rename("acme-jobs").returncode == 2  # nobody can be asked
    done = rename("acme-jobs", "--yes")
    assert done.returncode == 0, done
    left = subprocess.run(["git", "grep", "-il", "jobstack"], cwd=clone, check=False, capture_output=True, text=True)
    assert left.stdout == ""
    assert "ACME_JOBS_RUN_DIR" in (clone / "app/alive.py").read_text()
    assert rename("other_name").returncode == 2  # changes that are not committed
    # In a process of its own: this one has imported the old name.
    (clone / ".venv").symlink_to(ROOT / ".venv")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"],
        cwd=clone,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:]


@pytest.mark.parametrize("name", ["", "9lives", "Ärger", "a", "x" * 40, "jobstack"])
def test_a_name_that_cannot_be_one(rename: Rename, name: str) -> None:
    done = rename(name)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_outside_of_a_clone(clone: Path, rename: Rename) -> None:
    shutil.rmtree(clone / ".git")
    done = rename("acme")
    assert done.returncode == 2
    assert "not a git clone" in done.stderr


def test_a_renamed_clone_takes_over_later_changes(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """docs/upgrading.md, line by line, twice."""
    page = (ROOT / "docs/upgrading.md").read_text()
    once, each_time = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    mine = tmp_path_factory.mktemp("mine") / "repository"
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(mine.parent)}
    names = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def shell(folder: Path, lines: str) -> None:
        done = subprocess.run(
            ["sh", "-ec", lines], cwd=folder, env=tools | names, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"

    shell(clone, f"git branch -M main; git clone --quiet . {mine}")
    shell(mine, once)
    shell(mine, "echo '# ours' >> README.md; echo VALUE=1 > app/ours.py; git add .; git commit -qm ours")
    settings = mine / "app/settings.py"
    for number in (1, 2):
        # Theirs changes a line that has the name in it, and brings a file.
        theirs = (clone / "app/settings.py").read_text() + f"\n# jobstack takes {number}\n"
        (clone / "app/settings.py").write_text(theirs)
        shell(clone, f"echo jobstack > new{number}.txt; git rm -q --ignore-unmatch new{number - 1}.txt")
        shell(clone, "git add .; git commit -qm theirs")
        shell(mine, each_time)
        assert settings.read_text().endswith(f"# acme_jobs takes {number}\n")
        assert (mine / f"new{number}.txt").read_text() == "acme_jobs\n"
        assert not (mine / f"new{number - 1}.txt").exists()
        assert (mine / "README.md").read_text().endswith("# ours\n")
        assert (mine / "app/ours.py").exists()
