"""A call that must happen once. Why strangers may choose the address: `worker/outbound.py`."""

import json
import re
import socket
import ssl
import zlib
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpcore

from app.jobs.kinds.webhook import Payload, Result
from worker.context import Context
from worker.errors import PermanentError, TransientError
from worker.outbound import ForbiddenTarget, Outbound

CALL_SECONDS = 30.0  # from connecting to the last byte
BODY_BYTES = 64 * 1024


def run(payload: Payload, ctx: Context) -> Result:
    return Result(**ctx.once("call", lambda: _call(payload, ctx)))


def _call(payload: Payload, ctx: Context) -> dict[str, Any]:
    """A 2xx answer, as `Result` has it. Errors name the host as the caller gave it, no address behind it."""
    url, host = str(payload.url), payload.url.host
    headers = {
        "user-agent": "jobstack",
        "accept-encoding": "identity",
        **{name.lower(): value for name, value in payload.headers.items()},
        "host": urlsplit(url).netloc,  # httpcore's own lacks the brackets of an IPv6 address
        "content-type": "application/json",
        "idempotency-key": str(ctx.job_id),
    }
    body = json.dumps(payload.body, allow_nan=False).encode()
    network = Outbound(CALL_SECONDS, allow_private=ctx.settings.webhook_allow_private)
    try:
        with (
            # Not httpx, which is built on it but doesn't say how to give it one's own connections.
            httpcore.ConnectionPool(network_backend=network) as pool,
            pool.stream("POST", url, headers=list(headers.items()), content=body) as answer,
        ):
            if 200 <= answer.status < 300:
                return {"status": answer.status, "body": _text(answer)}
            raise _refusal(host, answer)
    except ForbiddenTarget:
        raise PermanentError(
            f"{host} is not on the public internet, and WEBHOOK_ALLOW_PRIVATE is off: nothing was sent"
        ) from None
    except UnicodeError:
        raise PermanentError(f"{host} is not a valid host name") from None
    except TimeoutError:
        raise TransientError(f"{host} did not answer in time ({CALL_SECONDS:g} s for everything)") from None
    except socket.gaierror:
        raise TransientError(f"the name {host} could not be resolved") from None
    except ssl.SSLError as error:
        raise TransientError(f"no secure connection to {host}: {error.reason}") from None
    except (OSError, httpcore.RemoteProtocolError):
        raise TransientError(f"the connection to {host} failed") from None


def _refusal(host: str | None, answer: httpcore.Response) -> Exception:
    message = f"{host} answered {answer.status}"
    if answer.status == 429 or answer.status >= 500:
        after = _headers(answer).get(b"retry-after", b"")
        return TransientError(message, retry_after=float(after) if after.isdigit() else None)
    if 300 <= answer.status < 400:
        message += "; redirects are not followed, give the final address"
    return PermanentError(message)


def _text(answer: httpcore.Response) -> str:
    """The first 64 kB as text that PostgreSQL can store: neither NUL nor half a surrogate pair."""
    received = bytearray()
    # 2xx was said, the call has happened. If the rest breaks off, another call would make it happen twice.
    with suppress(OSError, httpcore.RemoteProtocolError):
        for chunk in answer.iter_stream():
            received += chunk
            if len(received) >= BODY_BYTES:
                break
    raw = bytes(received[:BODY_BYTES])
    headers = _headers(answer)
    if headers.get(b"content-encoding") in (b"gzip", b"x-gzip", b"deflate"):  # it was not asked for
        with suppress(zlib.error):
            raw = zlib.decompressobj(wbits=47).decompress(raw, BODY_BYTES)  # 47: either header
    charset = re.search(rb"charset=\"?([\w.:-]+)", headers.get(b"content-type", b""))
    try:
        text = raw.decode(charset[1].decode() if charset else "utf-8", "replace")
    except (LookupError, UnicodeError):
        text = raw.decode("utf-8", "replace")
    text = re.sub("[\0\ud800-\udfff]", "\ufffd", text)
    return text.encode()[:BODY_BYTES].decode(errors="ignore")


def _headers(answer: httpcore.Response) -> dict[bytes, bytes]:
    return {name.lower(): value.lower() for name, value in answer.headers}
