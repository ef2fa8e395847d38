"""The smallest handler that can be watched, cancelled and handed back."""

from app.jobs.kinds.sleep import Payload, Result
from worker.context import Context


def run(payload: Payload, ctx: Context) -> Result:
    first = 0 if payload.seconds else payload.steps - 1  # nothing to wait for: all steps at once
    for step in range(first, payload.steps):
        ctx.sleep(payload.seconds / payload.steps)
        ctx.progress(step + 1, payload.steps)
    return Result(slept=payload.seconds)
