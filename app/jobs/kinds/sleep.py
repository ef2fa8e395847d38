"""Wait, and show progress."""

from pydantic import Field

from app.jobs.kind import Kind, Model


class Payload(Model):
    seconds: float = Field(ge=0, le=86_400, description="How long.")
    steps: int = Field(default=10, ge=1, le=1_000, description="How often progress is reported.")


class Result(Model):
    slept: float = Field(description="Seconds.")


KIND = Kind(
    "sleep",
    Payload,
    Result,
    description="Waits, step by step: to watch progress, cancelling and deploys.",
    # It may last a day, and can always be ended: the lease is all the protection it needs.
    soft_time_limit=0,
    time_limit=0,
    short=lambda payload: payload.seconds == 0,
)
