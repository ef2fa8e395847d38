"""Call a URL outside with a JSON body, once."""

from typing import Annotated, Any

from pydantic import Field, HttpUrl, JsonValue, StringConstraints, field_validator

from app.jobs.kind import Kind, Model

# Each of these decides how the request is framed, where it goes, or whether it counts as a repetition.
_OURS = {"host", "transfer-encoding", "connection", "idempotency-key"}
_SECRET = {"authorization", "proxy-authorization", "cookie"}

# RFC 9110: a token, and printable ASCII inside. With CR or LF in them a caller could write a second request.
HeaderName = Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", max_length=256)]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^([!-~]([\t -~]*[!-~])?)?$", max_length=8192)]


class Payload(Model):
    # Read as a browser reads it and kept in that form, so that the job shows the address that is really
    # called: `http://2130706433` becomes `http://127.0.0.1/`. Not strict: `?a[]=1` is no proper URL, and common.
    url: HttpUrl = Field(
        strict=False, description="http or https, any port, no credentials. Redirects are not followed."
    )
    body: JsonValue = Field(description="Any JSON; sent as it is.")
    headers: dict[HeaderName, HeaderValue] = Field(
        default={},
        max_length=50,
        json_schema_extra={"additionalProperties": False},  # other names than the pattern's
        description="Further headers; `Authorization` is never shown again. Not `Host`, `Content-*`, "
        "`Transfer-Encoding`, `Connection` or `Idempotency-Key`: those are set here.",
    )

    @field_validator("url")
    @classmethod
    def _without_credentials(cls, url: HttpUrl) -> HttpUrl:
        if url.username is not None or url.password is not None:
            raise ValueError("holds credentials, which everybody would see; send an Authorization header instead")
        return url

    @field_validator("headers")
    @classmethod
    def _leave_ours(cls, headers: dict[str, str]) -> dict[str, str]:
        seen = set()
        for name in headers:
            lower = name.lower()
            if lower in _OURS or lower.startswith("content-"):
                raise ValueError(f"{name} is set by the service; leave it out")
            if lower in seen:
                raise ValueError(f"{name} is given twice")
            seen.add(lower)
        return headers

    @staticmethod
    def shown(payload: dict[str, Any]) -> dict[str, Any]:
        """The stored payload as people may see it: values of headers that hold credentials are `***`."""
        headers = payload.get("headers")
        if not headers:
            return payload
        starred = {name: "***" if name.lower() in _SECRET else value for name, value in headers.items()}
        return {**payload, "headers": starred}


class Result(Model):
    status: int = Field(description="The answer's status, 200 to 299.")
    body: str = Field(description="The answer as text: its first 64 kB, less if the connection broke after the status.")


KIND = Kind(
    "webhook",
    Payload,
    Result,
    description="Calls a URL outside with a JSON body. The header Idempotency-Key is the job's id on every "
    "attempt, and an answer of 2xx that was recorded is never asked for again.",
    # The handler limits the call itself; these catch what it can't interrupt, a name server that hangs.
    soft_time_limit=60,
    time_limit=90,
    shown=Payload.shown,
)
