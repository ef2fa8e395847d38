"""The API: put together from its routes, with its pool, its Redis client and its publisher."""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app import elsewhere, logs
from app.api import auth, docs, errors, events, files, jobs, login, metrics, operations
from app.api.counts import QueueCounts
from app.api.middleware import LOGIN, RequestMiddleware
from app.api.overview import last_hour
from app.api.within import within
from app.database import Params, open_pool
from app.files.store import FileStore
from app.jobs import messages
from app.jobs.create import Creator
from app.jobs.kinds import offered_kinds
from app.jobs.publisher import Publisher
from app.jobs.stats import Stats
from app.settings import Settings, SettingsError, get_settings
from app.web import routes as web

log = logs.get(__name__)

DESCRIPTION = """
Hand in a job, get its id at once, and look at it until it is over. `202` means that the job is committed in PostgreSQL:
it will be run whatever happens to queue and workers. Errors are `application/problem+json`.
"""
# What a body may have besides the file or the payload that is limited: multipart's heads, a job's other fields.
ENVELOPE_BYTES = 64 * 1024
# A batch may be larger than a single job, but not a thousand times.
BATCH_BYTES_FACTOR = 16


def operation_id(route: APIRoute) -> str:
    """As generated clients call it: create_job."""
    return route.name


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application. Nothing is connected before it starts up."""
    settings = settings or get_settings()
    if settings.app_env != "local" and not settings.api_keys:
        raise SettingsError("jobstack: APP_ENV is not local, so API_KEYS must be set: name:key, separated by commas")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = app.state
        state.settings = settings
        state.files = FileStore(settings)
        state.pool = pool = open_pool(settings)
        state.redis = messages.connect_async(settings) if settings.jobs_execution == "celery" else None
        state.publisher = Publisher(settings, state.redis)
        state.stats = Stats(f"api@{socket.gethostname()}")
        state.creator = Creator(pool, state.publisher, state.stats)

        async def query(statement: Any, params: Params, *, prepare: bool | None = None) -> list[dict[str, Any]]:
            async with pool.connection() as connection:
                return await (await connection.execute(statement, params, prepare=prepare)).fetchall()

        state.query = query
        state.readiness = operations.readiness(state)
        state.counts = QueueCounts(query)
        state.last_hour = last_hour(query)
        state.first_look = web.first_look(state)
        state.metrics = metrics.Metrics(state)
        state.streams = events.Streams(settings.max_event_streams)
        state.job_events = events.JobEvents(state.streams, query)
        state.overview_events = events.OverviewEvents(state.streams, state)

        async def count() -> None:
            while True:
                await asyncio.sleep(settings.job_heartbeat_seconds)
                await state.stats.flush_by(pool)

        # Not waited for: an API that starts before its database answers 503 and heals by itself.
        await pool.open(wait=False)
        publishing = asyncio.create_task(state.publisher.run())
        counting = asyncio.create_task(count())
        # All modules are loaded and stay: looking through them for garbage again and again would hold up, for 50 ms,
        # whichever request is under way.
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            await state.job_events.stop()
            await state.overview_events.stop()
            counting.cancel()
            with suppress(errors.Problem):
                await within(state.stats.flush_by(pool), seconds=2)
            state.publisher.stop()
            await publishing
            if state.redis is not None:
                await state.redis.aclose()
            await pool.close(timeout=2)

    app = FastAPI(
        title="jobstack",
        description=DESCRIPTION,
        version="1",
        lifespan=lifespan,
        # FastAPI's own come from another host.
        docs_url=None,
        redoc_url=None,
        # FastAPI's own spans would come as well, with exceptions' texts: app/elsewhere.py has them.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        generate_unique_id_function=operation_id,
        # Shows what an answer is, not what it would be before defaults.
        separate_input_output_schemas=False,
    )
    errors.install(app)
    # Not by include_router, whose second round of matching costs a tenth of a request.
    app.router.routes.extend(jobs.make_router(tuple(offered_kinds(settings)), operation_id).routes)
    app.router.routes.extend(events.router.routes)
    app.include_router(events.page_router)
    app.include_router(files.router)
    app.include_router(operations.router)
    app.include_router(metrics.router)
    app.include_router(login.router)
    app.include_router(docs.router)
    app.add_exception_handler(auth.LoginNeeded, login.to_login)
    app.include_router(web.router)
    app.router.routes.append(web.assets)

    def limit(path: str) -> int:
        if path == "/api/files":
            return settings.max_upload_bytes + ENVELOPE_BYTES
        if path == LOGIN:
            return login.FORM_BYTES
        return settings.max_payload_bytes * (BATCH_BYTES_FACTOR if path == "/api/jobs/batch" else 1) + ENVELOPE_BYTES

    if settings.otel_exporter_otlp_endpoint:
        app.add_middleware(elsewhere.RequestSpans)
    app.add_middleware(RequestMiddleware, limit=limit, settings=settings)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            errors.describe(generate())
        return generate()

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend it
    return app


def __getattr__(name: str) -> Any:
    """`app.api.app:app` for uvicorn: made when it is asked for, so that importing this module needs no environment."""
    if name == "app":
        return create_app()
    raise AttributeError(name)
