"""Whether the tests that keep the promises can fail: each is run on a copy in which one line breaks its promise."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROMISES: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "promises.toml").read_text())["promise"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: f"{promise['number']}: {promise['says']}")
def test_a_broken_promise_is_noticed(promise: dict[str, Any], tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    broken = tmp_path / promise["file"]
    text = broken.read_text()
    assert text.count(promise["line"]) == 1, f"{promise['file']} has not exactly one {promise['line']!r}"
    broken.write_text(text.replace(promise["line"], promise["becomes"]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", promise["test"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    # 1: tests failed. Anything else is no answer: not found, not importable, interrupted.
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-3000:]


def test_every_promise_of_the_readme_is_here() -> None:
    section = (ROOT / "README.md").read_text().partition("## What it promises")[2].partition("\n## ")[0]
    promised = {int(line.partition(".")[0]) for line in section.splitlines() if line[:1].isdigit()}
    assert {promise["number"] for promise in PROMISES} == promised
