"""One stack for all tests here: starting it takes most of the time."""

import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.stack import Stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The first test builds the images.
    for item in items:
        item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def engine() -> None:
    """A running Docker engine. Without one these tests fail: `make e2e` was asked for."""
    if not shutil.which("docker"):
        pytest.fail("these tests need Docker: there is no `docker` on PATH")
    answer = subprocess.run(["docker", "info"], check=False, capture_output=True, text=True, timeout=20)
    if answer.returncode:
        pytest.fail(f"these tests need Docker: {answer.stderr.strip()}")


@pytest.fixture(scope="session")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All services, healthy."""
    stack = Stack(
        tmp_path_factory.mktemp("e2e"),
        files=("tests/e2e/receiver.yml",),
        # The receiver has a private address.
        WEBHOOK_ALLOW_PRIVATE="true",
    )
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a measured number although the test passes."""

    def print_now(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}")

    return print_now
