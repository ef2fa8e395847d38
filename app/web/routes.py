"""The pages. They show what the API has, by the same statements; whatever changes something goes to the API itself."""

import asyncio
import re
from typing import Any, get_args
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from psycopg.rows import DictRow
from pydantic import ValidationError
from starlette.routing import Mount

from app import ticks
from app.api.auth import visitor
from app.api.errors import Problem
from app.api.jobs import JobFilter, find_jobs, unknown_job
from app.api.overview import Overview, look_at_beat, overview
from app.api.shared import Shared
from app.api.within import within
from app.files import store
from app.jobs import statements
from app.jobs.kinds import all_kinds, offered_kinds
from app.jobs.requests import Status, shown
from app.queues import JOB_QUEUES
from app.web import story
from app.web.forms import fields
from app.web.templating import FOLDER, Assets, page

# What is pasted into the search: an id, its beginning, or a Celery task's id, which begins with it.
ID_PREFIX = re.compile(r"\s*([0-9a-f][0-9a-f-]{0,35})", re.IGNORECASE)

router = APIRouter(include_in_schema=False, dependencies=[Depends(visitor)])
assets = Mount("/static", Assets(directory=FOLDER / "static"))


@router.get("/")
async def first_page(request: Request) -> Response:
    """How it goes: queues, workers, beat, the newest jobs."""
    state = request.app.state
    now, newest = await state.first_look.now()
    context = {
        "overview": now,
        "troubles": troubles(now, has_redis=state.redis is not None),
        "newest": newest,
        "kinds": offered_kinds(state.settings),
    }
    return page(request, "overview.html", context)


def first_look(state: Any) -> Shared[tuple[Overview, list[DictRow]]]:
    """For the API's state: what the first page shows. All who watch it ask again at each event, 250 ms after it: they
    share an answer that is younger than that."""

    async def look() -> tuple[Overview, list[DictRow]]:
        newest = find_jobs(state, JobFilter(limit=10), columns=statements.LISTED)
        now, (rows, _) = await asyncio.gather(overview(state), newest)
        return now, rows

    return Shared(look, 0.2)


def troubles(now: Overview, *, has_redis: bool) -> list[tuple[str, str]]:
    """What an operator should look after, and how: (what, hint)."""
    found = []
    if has_redis and now.redis is None:
        found.append(("Redis does not answer.", "Jobs are accepted and kept, and run when it is back."))
    if empty := [queue.name for queue in now.queues if queue.consumers == 0]:
        found.append((f"No worker takes from {', '.join(empty)}.", "What waits there is kept. Look at: make ps"))
    if late := [entry.entry for entry in now.beat if entry.late]:
        found.append((f"Late: {', '.join(late)}.", "Does beat run, and a maintenance worker? Ask: make debug-beat"))
    return found


@router.get("/jobs")
async def list_page(request: Request) -> Response:
    """Jobs, by filters or by the beginning of an id."""
    given = {name: value for name, value in request.query_params.items() if value}
    search = given.pop("q", "").strip()
    found = ID_PREFIX.match(search)
    digits = found[1].replace("-", "")[:32] if found else ""
    if len(digits) == 32:
        return RedirectResponse(f"/jobs/{UUID(digits)}", 303)
    try:
        filters = JobFilter.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    if search and not digits:
        jobs: list[DictRow] = []
        next_cursor = None
    else:
        ids = (UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))) if digits else None
        jobs, next_cursor = await find_jobs(request.app.state, filters, ids, columns=statements.LISTED)
    context = {
        "jobs": jobs,
        "next_cursor": next_cursor,
        "filters": filters,
        "search": search,
        "statuses": get_args(Status),
        "kinds": list(all_kinds()),
        "queues": JOB_QUEUES,
    }
    return page(request, "jobs.html", context)


@router.get("/jobs/{job_id}")
async def job_page(request: Request, job_id: UUID) -> Response:
    """One job: what it is, how it went, what came out."""
    state = request.app.state
    rows, attempts = await asyncio.gather(
        within(state.query(statements.GET_STORY, {"id": job_id})),
        within(state.query(statements.ATTEMPTS, {"id": job_id})),
    )
    if not rows:
        raise unknown_job(job_id)
    [row] = rows
    kind = all_kinds().get(row["kind"])
    ids = story.file_ids(kind, row)
    found: list[DictRow] = await within(state.query(store.GET_MANY, {"ids": ids})) if ids else []
    files = {file["id"]: file for file in found}
    moments = story.moments(row, attempts[::-1])
    job = shown(row)
    given = {name: value for name, value in job.payload.items() if value is not None}
    context = {
        "job": job,
        "kind": kind,
        "cancel_requested_at": row["cancel_requested_at"],
        "moments": moments,
        "spans": story.spans(row, moments),
        # Without the fields that were left out.
        "payload": story.values(given, kind and kind.payload, files),
        "result": None if job.result is None else story.values(job.result, kind and kind.result, files),
    }
    return page(request, "job.html", context)


@router.get("/new")
async def kinds_page(request: Request) -> Response:
    """What can be started."""
    return page(request, "kinds.html", {"kinds": offered_kinds(request.app.state.settings).values()})


@router.get("/new/{name}")
async def form_page(request: Request, name: str) -> Response:
    """A form for one kind of job."""
    kind = offered_kinds(request.app.state.settings).get(name)
    if kind is None:
        raise Problem(404, "unknown-kind", "There is no such kind of job here; /new shows those there are.")
    return page(request, "form.html", {"kind": kind, "fields": fields(kind)})


@router.get("/schedule")
async def schedule_page(request: Request) -> Response:
    """What happens by itself, when it last did, and when it will."""
    state = request.app.state
    entries, latest = await asyncio.gather(look_at_beat(state), within(state.query(ticks.LATEST, {"limit": 30})))
    return page(request, "schedule.html", {"entries": entries, "ticks": latest})
