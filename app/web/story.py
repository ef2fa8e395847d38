"""What a job's page shows besides its fields: its life in order, and its values laid out by what they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal
from uuid import UUID

from psycopg.rows import DictRow

from app.jobs.kind import Kind, file_fields
from app.jobs.requests import Status
from app.web.templating import label

OVER = ("succeeded", "failed", "cancelled")
# A browser decodes these and nothing else of what strangers upload.
PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif")
LARGEST_PICTURE = 5_000_000  # bytes; larger ones are there to be downloaded
# Of a table.
MOST_ROWS, MOST_COLUMNS = 200, 12


@dataclass(frozen=True)
class Moment:
    """One point of a job's life. `began` is set where it was a span."""

    title: str
    at: datetime | None
    tone: Status
    note: str = ""
    began: datetime | None = None
    error: dict[str, Any] | None = None

    @property
    def seconds(self) -> float | None:
        return (self.at - self.began).total_seconds() if self.at and self.began else None


def moments(job: DictRow, attempts: Sequence[DictRow]) -> list[Moment]:
    """A job's life, oldest first. `attempts` are its unsuccessful ones, oldest first."""
    status, now = job["status"], job["now"]
    found = [Moment("Accepted", job["created_at"], "queued", f"with the key “{job['api_key']}”" * bool(job["api_key"]))]
    found += [
        Moment(
            f"Attempt {attempt['attempt']} failed",
            attempt["ended_at"],
            "failed",
            attempt["worker"] or "",
            attempt["started_at"],
            attempt["error"],
        )
        for attempt in attempts
    ]
    if status == "queued" and job["run_at"] > now:
        title = f"Attempt {job['attempt'] + 1} is due" if attempts else "Due"
        found.append(Moment(title, job["run_at"], "queued"))
    elif status == "queued":
        found.append(Moment("Waits for a worker", None, "queued"))
    # Which failed is among the attempts already.
    if job["started_at"] and status in ("running", "succeeded", "cancelled"):
        title = f"Attempt {job['attempt']} {'runs' if status == 'running' else 'started'}"
        found.append(Moment(title, job["started_at"], "running", job["worker"] or ""))
    if job["cancel_requested_at"]:
        found.append(Moment("Cancel asked for", job["cancel_requested_at"], "cancelled"))
    if status in OVER:
        note = f"after {job['attempt']} attempts" if job["attempt"] > 1 else ""
        found.append(Moment(status.capitalize(), job["finished_at"], status, note))
    return found


@dataclass(frozen=True)
class Span:
    """A stretch of the bar over a job's life, in thousandths of it."""

    x: float
    width: float
    tone: Status
    title: str


def spans(job: DictRow, found: Sequence[Moment]) -> list[Span]:
    """When the job ran, within the time from its creation until its end or now; the rest is waiting."""
    start, end = job["created_at"], job["finished_at"] or job["now"]
    whole = max((end - start).total_seconds(), 0.001)
    runs = [(moment.began, moment.at, moment.tone, moment.title) for moment in found if moment.began]
    if job["started_at"] and job["status"] in ("running", "succeeded", "cancelled"):
        runs.append((job["started_at"], end, job["status"], f"Attempt {job['attempt']}"))
    placed = []
    for began, ended, tone, title in runs:
        x = max((began - start).total_seconds() / whole * 1000, 0)
        width = max(((ended or end) - began).total_seconds() / whole * 1000, 6)  # or it can't be seen
        placed.append(Span(round(min(x, 1000 - width), 1), round(width, 1), tone, title))
    return placed


@dataclass(frozen=True)
class Value:
    """A field of a payload or a result. `rows` where it is a table; `headings` if its schema tells them."""

    label: str
    hint: str
    shape: Literal["file", "nothing", "number", "line", "text", "table", "json"]
    value: Any
    file: DictRow | None = None
    headings: tuple[str, ...] = ()

    @property
    def rows(self) -> list[list[Any]]:
        """What is shown of a table. A payload may hold a hundred thousand, and nobody else is served meanwhile."""
        return self.value[:MOST_ROWS] if self.shape == "table" else []

    @cached_property
    def most(self) -> float:
        """The largest number of a table of names and amounts, which is drawn as bars; else 0."""
        rows = self.rows
        fits = all(
            len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], int | float) and row[1] >= 0
            for row in rows
        )
        return max((row[1] for row in rows), default=0) if fits else 0

    @property
    def picture(self) -> bool:
        file = self.file
        return file is not None and file["content_type"] in PICTURES and file["size"] <= LARGEST_PICTURE


def file_ids(kind: Kind | None, job: DictRow) -> list[UUID]:
    """The files that payload and result name."""
    if kind is None:
        return []
    found = [(job["payload"], kind.payload), (job["result"] or {}, kind.result)]
    ids = [_id(values.get(name)) for values, model in found for name in file_fields(model)]
    return [file_id for file_id in ids if file_id]


def _id(value: Any) -> UUID | None:
    """None as well for what a kind's earlier version kept in the field."""
    try:
        return UUID(value)
    except (AttributeError, TypeError, ValueError):
        return None


def values(fields: dict[str, Any], model: Any, files: dict[UUID, DictRow]) -> list[Value]:
    """Each field in the shape that suits it. `model` is None for a kind that this version does not know."""
    described: dict[str, Any] = model.model_json_schema()["properties"] if model else {}
    references = file_fields(model) if model else []
    return [
        _value(name, value, described.get(name, {}), files, is_file=name in references)
        for name, value in _in_order(fields, described)
    ]


def _in_order(fields: dict[str, Any], described: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """As the model has them: PostgreSQL sorts keys by their length."""
    return sorted(fields.items(), key=lambda field: list(described).index(field[0]) if field[0] in described else 99)


def _value(name: str, value: Any, schema: dict[str, Any], files: dict[UUID, DictRow], *, is_file: bool) -> Value:
    about = (label(name), schema.get("description", ""))
    match value:
        case None:
            return Value(*about, "nothing", value)
        case str() if is_file and (file_id := _id(value)):
            return Value(*about, "file", file_id, files.get(file_id))
        case bool():
            return Value(*about, "line", "yes" if value else "no")
        case int() | float():
            return Value(*about, "number", value)
        case str():
            return Value(*about, "text" if len(value) > 80 or "\n" in value else "line", value)
        case [[_, *_], *_] if len(value[0]) <= MOST_COLUMNS and all(
            isinstance(row, list)
            and len(row) == len(value[0])
            and not any(isinstance(cell, list | dict) for cell in row)
            for row in value[:MOST_ROWS]
        ):
            columns = schema.get("items", {}).get("description", "").strip("[]").split(", ")
            return Value(*about, "table", value, headings=tuple(columns) if len(columns) == len(value[0]) else ())
    return Value(*about, "json", value)
