"""The hand-written template: what one writes with FastAPI, SQLAlchemy and Celery in an afternoon.

A row for each job, written by the endpoint and twice by the task, each time committed: as durable as this stack's rows,
without leases, fences, rescue, retries, or cancel. Async SQLAlchemy in the API, as everybody does; in the task psycopg
without it, which is faster than what most do.
"""

import asyncio
import os
import sys
import time
from functools import cache
from typing import Any
from uuid import UUID, uuid4

import psycopg
from celery import Celery

from benchmarks import peers
from benchmarks.peers import plain

TABLE = """
DROP TABLE IF EXISTS template_jobs;
CREATE TABLE template_jobs (
    id uuid PRIMARY KEY, kind text NOT NULL, payload jsonb NOT NULL, status text NOT NULL DEFAULT 'queued',
    created_at timestamptz NOT NULL DEFAULT now(), started_at timestamptz, finished_at timestamptz
);
CREATE INDEX ON template_jobs (status)
"""
RUNNING = "UPDATE template_jobs SET status = 'running', started_at = now() WHERE id = %s"
SUCCEEDED = "UPDATE template_jobs SET status = 'succeeded', finished_at = now() WHERE id = %s"
INSERT = "INSERT INTO template_jobs (id, kind, payload) VALUES (%s, 'noop', '{}')"

app = Celery("template", broker=os.environ["REDIS_URL"])
app.conf.update(plain.SETTINGS, task_default_queue="template")


@cache
def database() -> psycopg.Connection[Any]:
    """A child's one connection. Each statement is a transaction."""
    return psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)


@app.task(name="run_template")
def run(job_id: str, sent: float = 0.0) -> None:
    database().execute(RUNNING, [job_id])
    if sent:
        peers.done(UUID(job_id).int, sent)  # started
    database().execute(SUCCEEDED, [job_id])
    if not sent:
        peers.done(UUID(job_id).int)  # over


def fill(count: int) -> None:
    """The jobs' ids are their numbers."""
    database().execute(TABLE)
    jobs = [str(UUID(int=number)) for number in range(count)]
    with database().transaction():
        database().cursor().executemany(INSERT, [[job] for job in jobs])
    run.apply_async(("",))
    plain.multiply("template", [[job] for job in jobs])


def work() -> None:
    plain.work_on("benchmarks.peers.template", "template")


def send(count: int) -> None:
    """INSERT, commit, publish: `sent` is the time before the INSERT, as this stack's `created_at` is."""
    database().execute(TABLE)
    for number in range(count):
        sent = time.time()
        database().execute(INSERT, [UUID(int=number)])
        run.delay(str(UUID(int=number)), sent)
        time.sleep(peers.GAP_SECONDS)


def serve() -> None:
    # SQLAlchemy's asyncio asks for greenlet, which this stack does without. Last: all else is the stack's own.
    sys.path.append(os.environ["BENCH_LIBRARIES"])
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sqlalchemy import DateTime, String, Uuid, func
    from sqlalchemy.dialects.postgresql import JSONB
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    database().execute(TABLE)
    engine = create_async_engine(os.environ["DATABASE_URL"].replace("://", "+psycopg://", 1), pool_size=16)
    api = FastAPI()

    class Base(DeclarativeBase):
        pass

    class Job(Base):
        __tablename__ = "template_jobs"

        id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=uuid4)
        kind: Mapped[str] = mapped_column(String)
        payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
        status: Mapped[str] = mapped_column(String, default="queued")
        created_at: Mapped[Any] = mapped_column(DateTime(timezone=True), server_default=func.now())

    class NewJob(BaseModel):
        kind: str
        payload: dict[str, Any]

    class Answer(BaseModel):
        id: UUID
        status: str

    @api.post("/api/jobs", status_code=202)
    async def create(body: NewJob) -> Answer:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            job = Job(kind=body.kind, payload=body.payload)
            session.add(job)
            await session.commit()
        await asyncio.to_thread(app.send_task, "run_template", (str(job.id),))
        return Answer(id=job.id, status=job.status)

    @api.get("/health/ready")
    async def ready() -> None:
        return None

    uvicorn.run(api, port=int(os.environ["PORT"]), log_level="warning", access_log=False)


peers.main(globals())
