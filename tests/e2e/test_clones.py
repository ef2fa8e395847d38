"""A second clone on the same machine, and what it is edited for."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.stack import OURS, ROOT, Stack


@pytest.fixture(scope="module")
def clone(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Path]]:
    """A copy of the repository, and what runs from it."""
    folder = tmp_path_factory.mktemp("clone")
    root = folder / "repository"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(ROOT / ".dockerignore", root)
    stack = Stack(folder, root=root)
    try:
        stack.up(*OURS)
        yield stack, root
    finally:
        stack.down()


def test_two_clones_run_side_by_side(stack: Stack, clone: tuple[Stack, Path]) -> None:
    other, _ = clone
    assert stack.http.get("/health/ready").json()["status"] == "ok"
    assert other.http.get("/health/ready").json()["status"] == "ok"
    here = stack.create("text_report", {"text": "here"})
    assert stack.finished(here)["status"] == "succeeded"
    # Its own database, not the first one's.
    assert other.http.get(f"/api/jobs/{here}").status_code == 404


def test_watch_brings_edited_code_into_the_containers_that_it_concerns(
    clone: tuple[Stack, Path], say: Callable[[str], None]
) -> None:
    stack, root = clone

    def containers() -> dict[str, str]:
        return {service: stack.inspect(service)["Id"] for service in OURS}

    def described() -> bool:
        try:
            kinds = stack.http.get("/api/kinds").json()["kinds"]
        except httpx.TransportError:  # just being replaced
            return False
        return any(kind["description"].startswith("Edited: ") for kind in kinds)

    def slept() -> bool:
        try:
            return bool(stack.finished(stack.create("sleep", {"seconds": 0}))["result"] == {"slept": 42})
        except httpx.TransportError:  # as above, if the first edit was saved twice
            return False

    kind, handler = root / "app/jobs/kinds/sleep.py", root / "worker/handlers/sleep.py"
    edits: list[tuple[str, Path, str, Callable[[], bool]]] = [
        ("api", kind, kind.read_text().replace('description="Waits', 'description="Edited: waits'), described),
        ("worker", handler, handler.read_text() + "\n\ndef run(*_):\n    return Result(slept=42)\n", slept),
    ]
    before, edited = containers(), set[str]()
    watching = stack.watch()
    try:
        time.sleep(3)  # it says nowhere that it has begun to watch
        for service, path, text, live in edits:
            edited.add(service)
            began = saved = time.monotonic()
            path.write_text(text)
            while not live():
                now = time.monotonic()
                assert now - began < 90, f"{service} does not run the edited file"
                if now - saved > 15:  # perhaps it had not begun yet, and what was saved before it never sees
                    path.write_text(text)
                    saved = now
                time.sleep(0.05)
            say(f"docker compose watch: {service} runs the edited file {time.monotonic() - began:.1f} s after saving")
            # By all edits so far: one that was saved twice may be brought in twice, the second time during the next.
            after = containers()
            assert {name for name in OURS if before[name] != after[name]} == edited
    finally:
        watching.terminate()
        watching.wait(20)
