"""What schemathesis has to know of this API besides its OpenAPI. Loaded by SCHEMATHESIS_HOOKS, see test_fuzz.py."""

from datetime import UTC, datetime, timedelta
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, Response

# Why the API refuses what its schema allows, since no schema could tell.
REFUSED_BY_DESIGN = {
    "urn:jobstack:problem:unknown-file",
    "urn:jobstack:problem:idempotency-key-reused",
    # In "any JSON": U+0000, half surrogate pairs, integers beyond 64 bits.
    "urn:jobstack:problem:unusable-json",
}

# "At most a year ahead" moves with the clock, which a schema can't tell either.
times = st.integers(0, int((datetime.now(UTC) + timedelta(days=300)).timestamp()))
schemathesis.openapi.format("date-time", times.map(lambda second: datetime.fromtimestamp(second, UTC).isoformat()))


@schemathesis.check
def valid_data_is_accepted(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """In place of schemathesis's own positive_data_acceptance, which knows statuses and no reasons."""
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or response.status_code not in (400, 413, 415, 422):
        return
    problem = response.json()
    # A webhook's headers: Host and such are ours, and upper or lower case makes no other header.
    headers_only = all(error["field"].endswith(".payload.headers") for error in problem.get("errors", [{"field": ""}]))
    assert problem["type"] in REFUSED_BY_DESIGN or headers_only, f"valid, but refused: {problem['detail']}"
