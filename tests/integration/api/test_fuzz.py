"""schemathesis against our own OpenAPI: every answer must be one that the document promises."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.processes import ROOT, Process

# Requests of each sort for each operation. For a night: FUZZ_EXAMPLES=2000.
EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "10")
# The same ones each time, so that no change is refused for what it has not touched. A night looks for new ones.
SEED = () if "FUZZ_EXAMPLES" in os.environ else ("--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(0 if "FUZZ_EXAMPLES" in os.environ else 900)  # three minutes on two busy cores
def test_schemathesis_finds_nothing(serve_process: Callable[..., tuple[httpx.Client, Process]], tmp_path: Path) -> None:
    # As in production, so that a missing key is looked for as well.
    key = "2b7e151628aed2a6abf7"
    api, process = serve_process(APP_ENV="production", API_KEYS=f"fuzz:{key}", STORAGE_SHARED="true")
    run = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *("run", f"{api.base_url}/openapi.json", "--header", f"Authorization: Bearer {key}"),
            *("--phases", "examples,coverage,fuzzing,stateful", "--max-examples", EXAMPLES, *SEED),
            # Of how long it takes to make examples, or how many are of no use: no fault of the API's.
            *("--suppress-health-check", "all"),
            # Ours stands in for it: see schemathesis_hooks.py.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--output-sanitize", "false", "--generation-database", "none"),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.integration.api.schemathesis_hooks",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    # It ran, and our check with it.
    assert "15 selected / 15 total" in run.stdout
    assert '"mistake"' not in process.log
    assert "Traceback" not in process.log
