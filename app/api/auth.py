"""Who calls: a key as `Authorization: Bearer KEY`, or the cookie of a page's login, which stands for one.

Keys are compared in constant time against every key there is. A cookie is signed with the key that it stands for:
taking that key out of API_KEYS ends its sessions on every replica, and there is no further secret to keep.
"""

import hashlib
import hmac
from time import time
from typing import Annotated, Any, NamedTuple
from uuid import UUID, uuid4

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from itsdangerous import BadSignature, Signer

from app import logs
from app.api.errors import Problem
from app.api.within import within
from app.settings import Settings

log = logs.get("audit")

COOKIE = "jobstack_session"
SESSION_SECONDS = 12 * 3600
IS_ENDED = "SELECT 1 FROM ended_sessions WHERE id = %(id)s"

_bearer = HTTPBearer(auto_error=False, description="One of the keys in API_KEYS. Not needed where APP_ENV is local.")


class Session(NamedTuple):
    """`expires` in seconds since 1970, `name` of the key that it stands for."""

    id: UUID
    expires: int
    name: str


class LoginNeeded(Exception):
    """A page was asked for without a session: `login.py` answers with the way to one."""


def _refused(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


def name_of_key(sent: str, settings: Settings) -> str | None:
    """The name of the key that was sent."""
    found = None
    for name, key in settings.api_keys:
        if hmac.compare_digest(sent.encode(errors="replace"), key.get_secret_value().encode()):
            found = name
    return found


def _signer(key: str) -> Signer:
    # Derived: the key itself signs nothing, and nothing that is signed elsewhere is a cookie.
    return Signer(key, salt=COOKIE, key_derivation="hmac", digest_method=hashlib.sha256)


def new_cookie(key: str) -> str:
    """The value of a new session's cookie."""
    return _signer(key).sign(f"{uuid4().hex}.{int(time()) + SESSION_SECONDS}").decode()


async def session(request: Request) -> Session | None:
    """The session of the request's cookie, if there is one that is still good."""
    cookie = request.cookies.get(COOKIE, "")
    settings: Settings = request.app.state.settings
    # Before anything is computed: a long one is none of ours.
    for name, key in settings.api_keys if 0 < len(cookie) < 200 else ():
        try:
            signed = _signer(key.get_secret_value()).unsign(cookie.encode(errors="replace")).decode()
        except BadSignature:
            continue
        session_id, expires = signed.split(".")
        found = Session(UUID(session_id), int(expires), name)
        ended = found.expires < time() or await within(request.app.state.query(IS_ENDED, {"id": found.id}))
        return None if ended else found
    return None


async def _caller(request: Request, credentials: HTTPAuthorizationCredentials | None) -> str | None:
    """The name of the caller's key, empty for nobody where nobody needs a key, None where somebody would."""
    settings: Settings = request.app.state.settings
    if len(request.headers.getlist("authorization")) > 1:
        raise _refused("There are two Authorization headers; send one.")
    if credentials is not None:
        if (name := name_of_key(credentials.credentials, settings)) is None:
            raise _refused("This API key is not known here.")
        return name
    if "authorization" in request.headers:
        raise _refused("Write the header as: Authorization: Bearer KEY")
    if found := await session(request):
        return found.name
    return "" if settings.app_env == "local" else None


# Async, like all dependencies here: FastAPI runs others in a thread, which costs more than the whole check.
async def key_name(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """The name of the caller's key; empty for a caller without one, which only a local installation has."""
    if (name := await _caller(request, credentials)) is None:
        raise _refused("Send one of the keys in API_KEYS as: Authorization: Bearer KEY")
    return name


async def authenticate(request: Request) -> str:
    """As the dependency does, but before a byte of the body is read."""
    return await key_name(request, await _bearer(request) if "authorization" in request.headers else None)


async def visitor(request: Request) -> str:
    """For pages: as `key_name`, but who has neither key nor session is led to the login.

    Raises:
        LoginNeeded: there is no session.
    """
    credentials: Any = await _bearer(request) if "authorization" in request.headers else None
    if (name := await _caller(request, credentials)) is None:
        raise LoginNeeded
    return name


def audit(request: Request, action: str, *, key: str = "", **facts: object) -> None:
    """One line for what somebody should be able to ask about later. The request's id is bound to all its lines."""
    log.info("audit", action=action, key=key, client=request.client and request.client.host, **facts)
