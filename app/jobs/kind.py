"""What a kind of job is: a name, a payload model, a result model, and how it is run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.queues import Priority
from app.settings import Settings


class Model(BaseModel):
    """Base of payloads and results. Unknown fields are refused, wrong types too (no "5" for 5), and NaN and infinity,
    which JSON doesn't have."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _FileReference:
    """Marks a field that names an uploaded file: the job then protects that file from clean-up."""


# Not strict, since JSON writes a UUID as a string.
FileId = Annotated[UUID, Field(strict=False), _FileReference()]


def _is_file(annotation: object) -> bool:
    """Whether `FileId` stands in an annotation such as `FileId | None`."""
    marks = map(type, getattr(annotation, "__metadata__", ()))
    return _FileReference in marks or any(map(_is_file, get_args(annotation)))


@cache
def file_fields(model: type[BaseModel]) -> list[str]:
    """The fields of a payload or a result that name a file."""
    return [
        name
        for name, field in model.model_fields.items()
        if _is_file(field.annotation) or _FileReference in map(type, field.metadata)
    ]


def _never(payload: Model) -> bool:
    return False


def _unchanged(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


@dataclass(frozen=True)
class Kind:
    """One kind of job. Limits are seconds; None takes the setting's value, 0 means no limit.

    `shown` turns a stored payload into what the API may show (a secret header starred out, say).
    `short` says of a payload that its job takes milliseconds. Thousands of those a second run in groups that share
    what a job costs besides its handler (docs/short-jobs.md); none of its promises is weaker.
    """

    name: str
    payload: type[Model]
    result: type[Model]
    description: str
    priority: Priority = "default"
    max_attempts: int = 4  # one run and three retries
    soft_time_limit: int | None = None
    time_limit: int | None = None
    demo: bool = False  # only where DEMO_JOBS is on
    shown: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    short: Callable[[Any], bool] = _never

    def limits(self, settings: Settings) -> tuple[int, int]:
        """(soft, hard) seconds for the handler; 0 is none."""
        soft = settings.job_soft_time_limit if self.soft_time_limit is None else self.soft_time_limit
        hard = settings.job_time_limit if self.time_limit is None else self.time_limit
        if hard and soft >= hard:  # a kind may set one of the two: the soft one must come first
            soft = hard * 9 // 10
        return soft, hard

    def file_ids(self, payload: Model) -> Iterator[UUID]:
        """The uploaded files that this payload names."""
        for name in file_fields(type(payload)):
            if (value := getattr(payload, name)) is not None:
                yield value
