"""GitHub Actions run what the gate runs, with no more rights than that takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").iterdir())
}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"].values()]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(job: dict[str, Any]) -> list[str]:
    written = [step["run"] for step in job["steps"] if "run" in step]
    matrix: list[str] = job["strategy"]["matrix"].get("run", [])
    return matrix if written == ["${{ matrix.run }}"] else written


def test_ci_runs_what_the_gate_runs() -> None:
    gate = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    [check] = WORKFLOWS["ci"]["jobs"].values()
    assert commands(check) == gate


def test_a_newcomer_types_what_the_readme_says() -> None:
    first = (ROOT / "README.md").read_text().partition("```\n")[2].partition("```")[0]
    typed = [line.partition("#")[0].strip() for line in first.splitlines()]
    newcomer = commands(WORKFLOWS["nightly"]["jobs"]["newcomer"])
    assert [command for command in newcomer if command in typed] == typed


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_a_job_may_only_read_ends_in_time_and_runs_nothing_that_can_move(name: str, job: dict[str, Any]) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert "permissions" not in job
    assert job["timeout-minutes"] <= 180
    assert "concurrency" in WORKFLOWS[name]
    for step in job["steps"]:
        if action := step.get("uses", ""):
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action)
        if action.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    for command in commands(job):
        assert command.split()[:1] == ["make"]
        assert command.split()[1] in TARGETS


def test_each_hook_before_a_commit_is_a_tool_that_lint_runs_too() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text()
    for hook in hooks:
        assert hook["entry"].split()[0].replace(".venv/bin", "$(BIN)") in lint
