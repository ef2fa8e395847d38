"""The project of .railway/railway.py as the tests read it: its graph, and each service's variables."""

import importlib.util
import json
import re
import sys
from typing import Any

import pytest

from tests.processes import ROOT

# What Railway would make up.
SECRET = "kq7Jx2Vd9TzR4mWn8LbYc3HsFg6PeUa1XoBi5CtDyEjZvNrM"
VALUES = {
    "${{Postgres.DATABASE_URL}}": f"postgresql://postgres:{SECRET}@postgres.railway.internal:5432/railway",
    "${{Redis.REDIS_URL}}": f"redis://default:{SECRET}@redis.railway.internal:6379",
    "${{files.BUCKET}}": "files-jdhhd8oe18xi",
    "${{files.ENDPOINT}}": "https://storage.railway.app",
    "${{files.REGION}}": "auto",
    "${{files.ACCESS_KEY_ID}}": "key",
    "${{files.SECRET_ACCESS_KEY}}": SECRET,
}
OURS = ("api", "worker", "worker-maintenance", "beat", "flower")


def evaluate(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, dict[str, Any]]:
    """The resources by their names, as the CLI gets them: it calls `main` without a context."""
    for name in ("NEW_SECRETS", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"GITHUB_REPOSITORY": "team/jobs", **environment}.items():
        monkeypatch.setenv(name, value)
    # No __pycache__ beside what the CLI looks for.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("railway_config", ROOT / ".railway/railway.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph: dict[str, Any] = json.loads(json.dumps(module.main().to_graph()))
    return {resource["name"]: resource for resource in graph["resources"]}


def written(value: dict[str, Any]) -> str:
    """A variable as the CLI hands it to Railway."""
    if value["type"] == "reference":
        return f"${{{{{value['resource'].partition('.')[2]}.{value['output']}}}}}"
    return SECRET if value["type"] == "preserve" else str(value["value"])


def environment(resource: dict[str, Any]) -> dict[str, str]:
    """A service's variables as its process sees them."""
    variables = {name: written(value) for name, value in resource["variables"].items()}
    known = VALUES | {f"${{{{{name}}}}}": value for name, value in variables.items()}
    return {
        name: re.sub(r"\$\{\{.*?\}\}", lambda reference: known[reference[0]], value)
        for name, value in variables.items()
    }
