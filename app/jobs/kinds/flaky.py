"""Fail on purpose, to see what the service makes of it."""

from typing import Literal

from pydantic import Field

from app.jobs.kind import Kind, Model


class Payload(Model):
    failures: int = Field(ge=0, le=1_000_000, description="How many attempts fail; the next one succeeds.")
    error: Literal["transient", "permanent", "crash", "exit", "oom", "hang"] = Field(
        default="transient",
        description="How: an error that is retried, one that is not, a segmentation fault, an exit, "
        "memory until the kernel kills, or a loop that no soft time limit ends.",
    )


class Result(Model):
    attempt: int = Field(description="The attempt that succeeded, from 1.")


KIND = Kind(
    "flaky",
    Payload,
    Result,
    description="Fails in its first attempts, in a way to choose, then succeeds. With 0 failures: a no-op.",
    soft_time_limit=5,
    time_limit=10,
    demo=True,
)
