"""One stack for all pages, in a folder of its own: a clone that somebody is on call for."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import engine, pytest_collection_modifyitems
from tests.runbooks.night import Night

__all__ = ["engine", "pytest_collection_modifyitems"]


@pytest.fixture(scope="session")
def night(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    night = Night(tmp_path_factory.mktemp("runbooks"))
    try:
        night.up()
        yield night
    finally:
        night.down()
