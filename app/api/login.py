"""The pages' login: a key of API_KEYS, once, for a cookie of 12 hours that no script and no other site can use.

There is no lock-out and no pause after a wrong key: what keeps keys from being guessed is their length (see
`app/settings.py`), the API itself answers faster than this page, and who waits holds a place.
"""

import asyncio
import re
from urllib.parse import parse_qsl, quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from app.api import auth
from app.api.errors import Problem
from app.api.within import within
from app.settings import Settings
from app.web.templating import page

router = APIRouter(include_in_schema=False)

# A browser sends the form in one piece.
FORM_BYTES = 4096
FORM_SECONDS = 5.0
# Of this site only. Browsers read a backslash as a slash, and skip tabs and line ends.
OWN_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]*")
END = """
WITH expired AS (DELETE FROM ended_sessions WHERE expires_at < now())
INSERT INTO ended_sessions (id, expires_at) VALUES (%(id)s, to_timestamp(%(expires)s)) ON CONFLICT DO NOTHING
RETURNING id
"""


def _own(path: str) -> str:
    return path if OWN_PATH.fullmatch(path) else "/"


def to_login(request: Request, error: Exception) -> Response:
    """The answer to `auth.LoginNeeded`."""
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(_own(path), safe='')}", 303)


def _page(request: Request, following: str, status: int = 200, wrong: str = "") -> Response:
    return page(request, "login.html", {"next": following, "wrong": wrong}, status)


@router.get("/login")
async def login_page(request: Request) -> Response:
    """The form."""
    following = _own(request.query_params.get("next", "/"))
    if await auth.session(request):
        return RedirectResponse(following, 303)
    form = _page(request, following)
    # Who follows a link from another site comes without the cookie (SameSite=Strict), logged in or not. This site's own
    # page then goes there once more, with it.
    if request.headers.get("sec-fetch-site") == "cross-site":
        form.headers["Refresh"] = f"0; url={following}"
    return form


@router.post("/login")
async def login(request: Request) -> Response:
    """Trades the form's `key` for a session."""
    settings: Settings = request.app.state.settings
    try:
        async with asyncio.timeout(FORM_SECONDS):
            body = await request.body()
        form = dict(parse_qsl(body.decode(errors="replace"), max_num_fields=5))
    except TimeoutError:
        # Closed, since the rest may still come.
        raise Problem(408, "too-slow", "The form did not come in time.", headers={"Connection": "close"}) from None
    except ValueError:
        raise Problem(422, "malformed-form", "Send the form fields key and next.") from None
    key, following = form.get("key", "").strip(), _own(form.get("next", "/"))
    name = auth.name_of_key(key, settings)
    if name is None:
        auth.audit(request, "login_failed")
        return _page(request, following, 401, "This key is not known here.")
    auth.audit(request, "login", key=name)
    answer = RedirectResponse(following, 303)
    answer.set_cookie(
        auth.COOKIE,
        auth.new_cookie(key),
        max_age=auth.SESSION_SECONDS,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
async def logout(request: Request) -> Response:
    """Ends the session everywhere: a copy of its cookie opens nothing any more."""
    if found := await auth.session(request):
        await within(request.app.state.query(END, {"id": found.id, "expires": found.expires}))
        auth.audit(request, "logout", key=found.name)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(auth.COOKIE, secure=request.url.scheme == "https", httponly=True, samesite="strict")
    return answer
