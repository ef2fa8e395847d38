"""What a client may ask for, and what it gets: the models of the jobs API."""

import re
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field, WithJsonSchema, create_model

from app.jobs.kind import Model
from app.jobs.kinds import all_kinds
from app.queues import Priority

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
MOST_IN_BATCH = 1000
LONGEST_DELAY = timedelta(days=366)
# Printable ASCII. A space is printable, but one at an end would be cut off by HTTP.
KEY_PATTERN = "^[!-~]+( +[!-~]+)*$"
LONGEST_KEY = 255


def _text_only(value: object) -> object:
    if value is not None and not (isinstance(value, str) and "T" in value.upper()):
        raise ValueError("write a time as RFC 3339 text with a zone, such as 2030-01-31T12:00:00Z")
    return value


def _at_most_a_year(value: datetime | None) -> datetime | None:
    if value is not None and value > datetime.now(UTC) + LONGEST_DELAY:
        raise ValueError("run_at may be at most a year ahead")
    # Past means now. The far past is dropped here, since some of it has no UTC equivalent.
    return None if value is None or value.year < 2000 else value.astimezone(UTC)


def checked_key(value: str) -> str:
    """An idempotency key as it is, or ValueError."""
    if len(value) > LONGEST_KEY or not re.fullmatch(KEY_PATTERN, value):
        raise ValueError(f"use 1 to {LONGEST_KEY} printable ASCII characters, with no space at either end")
    return value


KEY_SCHEMA = {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY, "pattern": KEY_PATTERN}
IdempotencyKey = Annotated[str, AfterValidator(checked_key), WithJsonSchema(KEY_SCHEMA)]

RunAt = Annotated[
    AwareDatetime | None,
    Field(strict=False, description="Not before this time, with a zone; at most a year ahead. Past means now."),
    BeforeValidator(_text_only),
    AfterValidator(_at_most_a_year),
]


class JobRequest(Model):
    """The common shape of the models that `request_type` makes, one a kind."""

    kind: str
    payload: Any
    priority: Priority | None = Field(None, description="Decides the queue; the kind's own if left out.")
    run_at: RunAt = None
    max_attempts: int | None = Field(None, ge=1, le=25, description="Runs in all, retries included.")


class NewJob(NamedTuple):
    """A validated request on its way into the table. A tuple, since a batch makes a thousand of them at once."""

    id: UUID
    kind: str
    priority: Priority
    queue: str
    payload: str
    max_attempts: int
    run_at: datetime | None
    file_ids: list[UUID]
    idempotency_key: str | None
    request_hash: bytes | None
    api_key: str
    request_id: str | None
    short: bool


class Progress(BaseModel):
    """How far a job says it is, in units of its own."""

    current: float
    total: float | None
    message: str | None


class JobError(BaseModel):
    """Why a job failed; while it is queued again, why its last attempt did."""

    type: str
    message: str


class Job(BaseModel):
    """A job as the API shows it. Times are UTC."""

    id: UUID
    kind: str
    status: Status
    priority: Priority
    queue: str
    payload: dict[str, Any]
    result: dict[str, Any] | None
    error: JobError | None
    progress: Progress | None
    attempt: int = Field(description="Runs so far; a hand-back at a deploy does not count.")
    max_attempts: int
    run_at: datetime
    created_at: datetime
    started_at: datetime | None
    heartbeat_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    request_id: str | None


def shown(row: dict[str, Any]) -> Job:
    """A row as the API shows it: what a kind keeps secret is starred out."""
    kind = all_kinds().get(row["kind"])
    payload = kind.shown(row["payload"]) if kind else row["payload"]
    return Job.model_validate({**row, "payload": payload})


def _title(name: str) -> str:
    return "".join(map(str.capitalize, name.split("_")))


@cache
def _payload_type(name: str) -> type[Model]:
    """A kind's payload under a name of its own, since generated clients name their types by it."""
    base = all_kinds()[name].payload
    return create_model(f"{_title(name)}Payload", __base__=base, __doc__=base.__doc__)


@cache
def request_type(names: tuple[str, ...], *, in_batch: bool = False) -> Any:
    """The body of a create call for the kinds of these names: one model a kind, told apart by `kind`."""
    models = []
    for name in names:
        kind = all_kinds()[name]
        fields: dict[str, Any] = {"kind": (Literal[name], ...), "payload": (_payload_type(name), ...)}
        if in_batch:
            fields["idempotency_key"] = (IdempotencyKey | None, None)
        title = _title(name) + ("BatchItem" if in_batch else "Job")
        models.append(create_model(title, __base__=JobRequest, __doc__=kind.description, **fields))
    if len(models) == 1:
        return models[0]
    return Annotated[Union[tuple(models)], Field(discriminator="kind")]  # noqa: UP007 - a union made at run time


def batch_type(names: tuple[str, ...]) -> Any:
    """The body of a batch call."""
    item = request_type(names, in_batch=True)
    jobs: Any = Annotated[list[item], Field(min_length=1, max_length=MOST_IN_BATCH)]  # type: ignore[valid-type]
    return create_model("JobBatch", __base__=Model, __doc__="All of them are created, or none.", jobs=(jobs, ...))
