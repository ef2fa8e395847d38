"""The lock files: what was tested is what ships, and it can be installed from nothing but an index."""

import re
from pathlib import Path

import pytest

LOCKS = Path(__file__).parents[2] / "requirements"
IMAGES = ("api", "worker", "beat", "flower")
SHIPPED = (*IMAGES, "elsewhere")


def pins(lock: str) -> set[str]:
    """Each `name==version ; marker` of a lock file, without its hashes."""
    lines = (LOCKS / f"{lock}.txt").read_text().splitlines()
    return {line.removesuffix("\\").strip() for line in lines if line[:1].isalnum()}


def names(lock: str) -> set[str]:
    return {re.split(r"[=\[ ]", pin)[0] for pin in pins(lock)}


@pytest.mark.parametrize("image", SHIPPED)
def test_an_image_has_the_versions_that_the_tests_ran_with(image: str) -> None:
    # Not the whole lines: a marker may be narrower in an image, whose other libraries ask for less.
    tested, shipped = ({pin.split(" ")[0] for pin in pins(lock)} for lock in ("dev", image))
    assert shipped <= tested


@pytest.mark.parametrize("lock", [*SHIPPED, "dev", "ansible"])
def test_every_pin_has_hashes_and_no_source_of_its_own(lock: str) -> None:
    text = (LOCKS / f"{lock}.txt").read_text()
    for block in re.split(r"\n(?=\S)", text):
        assert re.match(r"[\w.\[\],-]+==\S+( ; [^\n]+)? \\\n    --hash=sha256:", block), block
    assert "://" not in text


def test_only_the_worker_has_the_handlers_libraries() -> None:
    handlers = {"httpx", "numpy", "pillow", "soundfile"}
    assert handlers <= names("worker")
    for image in ("api", "beat", "flower"):
        assert not handlers & names(image)


def test_celery_kombu_and_redis_are_pinned_together() -> None:
    """Resolved apart, they end up in combinations that nobody tested."""
    asked = (LOCKS / "celery.in").read_text()
    assert all(re.search(rf"^{name}\S*==", asked, re.MULTILINE) for name in ("celery", "kombu", "redis"))
