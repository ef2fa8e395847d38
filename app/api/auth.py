"""API keys: `Authorization: Bearer KEY`, compared in constant time against every key there is."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.api.errors import Problem
from app.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="One of the keys in API_KEYS. Not needed where APP_ENV is local.")


def _refused(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


# Async, like all dependencies here: FastAPI runs others in a thread, which costs more than the whole check.
async def key_name(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """The name of the caller's key; empty for a caller without one, which only a local installation has."""
    settings: Settings = request.app.state.settings
    if credentials is None:
        if "authorization" in request.headers:
            raise _refused("Write the header as: Authorization: Bearer KEY")
        if settings.app_env == "local":
            return ""
        raise _refused("Send one of the keys in API_KEYS as: Authorization: Bearer KEY")
    sent, found = credentials.credentials.encode(), None
    for name, key in settings.api_keys.items():
        if hmac.compare_digest(sent, key.get_secret_value().encode()):
            found = name
    if found is None:
        raise _refused("This API key is not known here.")
    return found


async def authenticate(request: Request) -> str:
    """As the dependency does, but before a byte of the body is read."""
    return await key_name(request, await _bearer(request) if "authorization" in request.headers else None)
