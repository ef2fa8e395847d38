"""What a kind's declaration leads to."""

import pytest

from app.jobs.kind import Kind, Model
from app.settings import Settings


@pytest.mark.parametrize(
    ("soft", "hard", "limits"),
    [
        (None, None, (3300, 3600)),
        (5, 10, (5, 10)),
        (None, 60, (54, 60)),
        (7200, None, (3240, 3600)),
        (0, None, (0, 3600)),
        (0, 0, (0, 0)),
        (None, 0, (3300, 0)),
    ],
)
def test_the_soft_limit_comes_before_the_hard_one(soft: int | None, hard: int | None, limits: tuple[int, int]) -> None:
    settings = Settings.model_construct(job_soft_time_limit=3300, job_time_limit=3600)
    kind = Kind("k", Model, Model, description="", soft_time_limit=soft, time_limit=hard)
    assert kind.limits(settings) == limits
