"""The images that Railway would build: from the committed files alone, and small."""

import json

import pytest

from tests.railway.conftest import Seen
from tests.railway.rehearsal import IMAGES, Rehearsal, docker, megabytes_over_base, revision

pytestmark = pytest.mark.timeout(900)

# Railway stores and moves each image at each deploy.
AIMS = {"api": 120, "worker": 180}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_small_knows_no_secret_and_says_what_it_is(project: Rehearsal, seen: Seen, image: str) -> None:
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
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", project.tag(image)))
    assert labels["org.opencontainers.image.revision"] == revision()
    assert labels["org.opencontainers.image.title"] == f"jobstack {image}"
