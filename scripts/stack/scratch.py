"""A PostgreSQL for one command, thrown away afterwards: `make revision` and the schema check of `make lint`."""

import os
import subprocess

from scripts.stack import ROOT, VENV, servers


def run(command: list[str]) -> int:
    """The command's exit code, run with DATABASE_URL pointing to an empty database."""
    with servers.temporary_postgres() as url:
        # Inline: a migration has no use for Redis, and without this the settings would ask for one.
        changed = {"DATABASE_URL": url, "JOBS_EXECUTION": "inline", "APP_ENV": "local", "PYTHONPATH": str(ROOT)}
        path = f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, **changed, "PATH": path}
        return subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode
