"""What operators and machines ask: kinds, queues, health."""

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from psycopg.errors import UndefinedTable
from pydantic import BaseModel

from app.api.auth import key_name
from app.api.errors import Problem, responses
from app.api.shared import Shared
from app.api.within import within
from app.database import CONNECTION_LOST, SCHEMA_REVISION
from app.jobs.kinds import offered_kinds
from app.jobs.messages import REDIS_ERRORS
from app.queues import ALL_QUEUES, MAINTENANCE, Priority
from app.settings import Settings

router = APIRouter()
HEALTH_SECONDS = 2.0
# Anybody may ask, as often as he likes.
LOOK_SECONDS = 1.0


class KindInfo(BaseModel):
    """A kind of job; the schemas are JSON Schema."""

    kind: str
    description: str
    priority: Priority
    payload_schema: dict[str, Any]
    result_schema: dict[str, Any]


class Kinds(BaseModel):
    kinds: list[KindInfo]


class QueueInfo(BaseModel):
    """`queued` and `running` count rows in PostgreSQL, `messages` what waits in Redis (null while that is away)."""

    name: str
    queued: int
    running: int
    oldest_queued_seconds: float | None
    messages: int | None
    window: int | None


class Queues(BaseModel):
    queues: list[QueueInfo]


State = Literal["ok", "degraded", "unavailable"]


class Readiness(BaseModel):
    """`checks` has each part's state, or what is wrong with it."""

    status: State
    checks: dict[str, str]


@router.get("/api/kinds", tags=["operations"], dependencies=[Depends(key_name)], responses=responses(401))
async def kinds(request: Request) -> Kinds:
    """The kinds of job that this installation runs."""
    found = offered_kinds(request.app.state.settings).values()
    return Kinds(
        kinds=[
            KindInfo(
                kind=kind.name,
                description=kind.description,
                priority=kind.priority,
                payload_schema=kind.payload.model_json_schema(),
                result_schema=kind.result.model_json_schema(),
            )
            for kind in found
        ]
    )


@router.get("/api/queues", tags=["operations"], dependencies=[Depends(key_name)], responses=responses(401, 503))
async def queues(request: Request) -> Queues:
    """How much waits where."""
    return Queues(queues=await _queues(request.app.state))


async def _queues(state: Any) -> list[QueueInfo]:
    settings: Settings = state.settings
    rows, lengths = await asyncio.gather(state.counts.now(), _lengths(state.redis))
    return [
        QueueInfo(
            **row,
            messages=lengths.get(row["name"]),
            window=None if row["name"] == MAINTENANCE else settings.queue_window,
        )
        for row in rows
    ]


async def _lengths(client: Any) -> dict[str, int]:
    if client is None:
        return {}
    pipeline = client.pipeline(transaction=False)
    for queue in ALL_QUEUES:
        pipeline.llen(queue)
    try:
        return dict(zip(ALL_QUEUES, await pipeline.execute(), strict=True))
    except REDIS_ERRORS:
        return {}


@router.get("/health/live", tags=["health"])
async def live() -> dict[str, Literal["ok"]]:
    """The process answers. Asks nobody else: a restart would not mend a database."""
    return {"status": "ok"}


@router.get("/health/ready", tags=["health"], responses={503: {"model": Readiness}})
@router.get("/health", include_in_schema=False)
async def ready(request: Request, response: Response) -> Readiness:
    """Whether requests can be served: PostgreSQL answers and is migrated. Without Redis, jobs are accepted as well."""
    found: Readiness = await request.app.state.readiness.now()
    response.status_code = 503 if found.status == "unavailable" else 200
    return found


def readiness(state: Any) -> Shared[Readiness]:
    """For the API's state: one look a second, however many ask."""
    return Shared(lambda: _look(state), LOOK_SECONDS)


async def _look(state: Any) -> Readiness:
    checks = dict(await asyncio.gather(_check_postgres(state), _check_redis(state), _check_storage(state)))
    postgres = checks.pop("postgres")
    revision = postgres if isinstance(postgres, str) else None
    result = {
        "postgres": "ok" if revision is not None else "unavailable",
        "migrations": _migrations(revision),
        **checks,
    }
    essential = result["postgres"] == result["migrations"] == "ok"
    status: State = "unavailable" if not essential else "ok" if set(result.values()) == {"ok"} else "degraded"
    return Readiness(status=status, checks=result)


def _migrations(revision: str | None) -> str:
    if revision is None:
        return "unknown"
    if revision >= SCHEMA_REVISION:
        return "ok"
    return f"at {revision or 'nothing'}, this code needs {SCHEMA_REVISION}: run python -m app.migrate"


async def _check_postgres(state: Any) -> tuple[str, str | None]:
    """The schema's revision, empty if there is none, None if PostgreSQL doesn't answer."""
    query = state.query("SELECT max(version_num) AS revision FROM alembic_version", {})
    try:
        [row] = await within(query, seconds=HEALTH_SECONDS)
    except UndefinedTable:
        return "postgres", ""
    except (*CONNECTION_LOST, Problem):
        return "postgres", None
    return "postgres", row["revision"] or ""


async def _check_redis(state: Any) -> tuple[str, str]:
    if state.redis is None:
        return "redis", "ok"
    try:
        await within(state.redis.ping(), part="Redis", seconds=HEALTH_SECONDS)
    except (*REDIS_ERRORS, Problem):
        return "redis", "unavailable"
    return "redis", "ok"


async def _check_storage(state: Any) -> tuple[str, str]:
    try:
        await within(state.files.check(), part="The storage of files", seconds=HEALTH_SECONDS)
    except Exception:  # noqa: BLE001
        # Whatever the storage's library raises; its text may contain credentials.
        return "storage", "unavailable"
    return "storage", "ok"
