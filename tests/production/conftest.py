"""One production stack for all tests here, as docs/production.md starts it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import engine  # noqa: F401
from tests.production.host import Host


def docker(*arguments: str) -> int:
    return subprocess.run(["docker", *arguments], check=False, capture_output=True).returncode


@pytest.fixture(scope="session")
def host(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:  # noqa: F811
    if docker("image", "inspect", "caddy:2") and docker("pull", "--quiet", "caddy:2"):
        recipe = Path(__file__).with_name("caddy.Dockerfile")
        assert docker("build", "--tag", "caddy:2", "--file", str(recipe), str(recipe.parent)) == 0
    host = Host(tmp_path_factory.mktemp("production"))
    try:
        host.up()
        yield host
    finally:
        host.down()
