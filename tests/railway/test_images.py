"""The images that Railway would build: from the committed files alone, and small."""

import pytest

from tests.railway.conftest import Seen
from tests.railway.rehearsal import IMAGES, Rehearsal, docker, megabytes_over_base

# Railway stores and moves each image at each deploy.
AIMS = {"api": 120, "worker": 180}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_small_and_knows_no_secret(project: Rehearsal, seen: Seen, image: str) -> None:
    size = megabytes_over_base(project.tag(image))
    seen.images[image]["size"] = size
    if image in AIMS:
        seen.images[image]["aim"] = AIMS[image]
        assert size <= AIMS[image]
    environment = docker(
        "image", "inspect", "--format", "{{range .Config.Env}}{{println .}}{{end}}", project.tag(image)
    )
    assert "_URL=" not in environment
    assert "KEY=" not in environment
