"""The kind `sleep`."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from app.jobs.kinds.sleep import Payload, Result
from worker.context import Context
from worker.handlers import sleep


@pytest.mark.parametrize(
    ("payload", "naps", "reports"),
    [
        ({"seconds": 3, "steps": 3}, [1, 1, 1], [(1, 3), (2, 3), (3, 3)]),
        ({"seconds": 5}, [0.5] * 10, [(step, 10) for step in range(1, 11)]),
        ({"seconds": 0, "steps": 1}, [0], [(1, 1)]),
    ],
)
def test_it_sleeps_step_by_step(payload: dict[str, Any], naps: list[float], reports: list[Any]) -> None:
    slept: list[float] = []
    reported: list[Any] = []

    def progress(current: float, total: float) -> None:
        assert len(slept) == current, "a step is reported after it, not before"
        reported.append((current, total))

    context = cast(Context, SimpleNamespace(sleep=slept.append, progress=progress))
    assert sleep.run(Payload.model_validate(payload), context) == Result(slept=payload["seconds"])
    assert slept == naps
    assert reported == reports


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"seconds": -0.1},
        {"seconds": 86_400.1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": 1, "steps": 0},
        {"seconds": 1, "steps": 1001},
        {"seconds": 1, "steps": 1.5},
        {"seconds": 1, "naps": 1},
    ],
)
def test_bad_payloads(payload: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Payload.model_validate(payload)


@pytest.mark.parametrize("payload", [{"seconds": 86_400, "steps": 1000}, {"seconds": 0, "steps": 1}])
def test_the_bounds_are_allowed(payload: dict[str, Any]) -> None:
    Payload.model_validate(payload)
