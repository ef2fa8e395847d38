"""Request bodies: JSON as RFC 8259 has it, within what PostgreSQL can store."""

import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.api.auth import authenticate
from app.api.errors import Problem

_LARGEST = 2**63 - 1
_EXACT = 2**53
# Pydantic and PostgreSQL give up at depths of their own, and Python's parser at another one in each version.
_MOST_LEVELS = 100


class JsonRoute(APIRoute):
    """A route that asks for the key first, whose name is then in `scope["api_key"]`.

    One with a body is called as `endpoint(request, body)`. It has no other parameter: a header is read from the request
    and described by `openapi_extra`. FastAPI's own way to the same call takes longer than all else that is done for a
    job.
    """

    def __init__(self, *args: Any, openapi_extra: dict[str, Any] | None = None, **options: Any) -> None:
        # Said here and not by a dependency, which FastAPI would ask again, for a sixth of a request's time.
        extra = {"security": [{"HTTPBearer": []}], **(openapi_extra or {})}
        super().__init__(*args, openapi_extra=extra, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            request.scope["api_key"] = await authenticate(request)
            return await handle(request)

        return handler

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.body_field is None or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive)
        scope["api_key"] = await authenticate(request)
        # Also what keeps other sites' pages away from an API without keys: browsers ask before they send JSON.
        if not _says_json(request.headers.get("content-type", "")):
            raise Problem(415, "not-json", "Send the body as JSON, with the header Content-Type: application/json")
        text = await request.body()
        if not text:
            raise RequestValidationError([{"loc": ("body",), "msg": "Field required"}])
        body, errors = self.body_field.validate(loads(text), loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        response = await self.endpoint(request, body)
        await response(scope, receive, send)


def _says_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def loads(body: bytes) -> Any:
    """The body's value.

    Raises:
        Problem: 400 where it isn't JSON, 422 where it is but can't be stored: NUL, lone surrogates, integers beyond
            64 bits, a key twice in an object, nesting too deep.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(f"The body is not UTF-8 (byte {error.start}).", 400)
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        _refuse(f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", 400)
    except RecursionError:
        _refuse_depth()
    # Only escapes can bring in bad characters: raw ones are no valid JSON or no valid UTF-8.
    if "\\u" in text:
        _check(value, (dict, list, str))
    elif text.count("[") + text.count("{") > _MOST_LEVELS:
        _check(value, (dict, list))
    return value


def _check(value: Any, kinds: tuple[type, ...]) -> None:
    """Depth, and the characters of strings if those are among the kinds of values to look at."""
    level: list[Any] = [value] if isinstance(value, kinds) else []
    depth = 1
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            else:
                if depth > _MOST_LEVELS:
                    _refuse_depth()
                inside = [*item, *item.values()] if isinstance(item, dict) else item
                below += [each for each in inside if isinstance(each, kinds)]
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    if "\x00" in text:
        _refuse("A string contains the character U+0000, which PostgreSQL cannot store; leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse("A string contains half of a surrogate pair, which is no character; send both halves, or none.")


def _refuse(detail: str, status: int = 422) -> NoReturn:
    raise Problem(status, "unusable-json", detail)


def _refuse_depth() -> NoReturn:
    _refuse(f"The JSON is nested more than {_MOST_LEVELS} levels deep; send it flatter, as a string or as a file.")


def _constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON; leave the value out or send null.", 400)


def _integer(text: str) -> int:
    # Other languages read a larger one as a rounded float: two programs would see two values.
    if len(text) > 20 or not -_LARGEST - 1 <= (value := int(text)) <= _LARGEST:
        _refuse("An integer does not fit into 64 bits; send it as a string.")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse("A number is larger than a 64-bit float can hold; send it as a string.")
    # JSON and JSON Schema know one sort of number: 5.0 is an integer too, and some languages write it so.
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        _refuse(f"The key {twice[:100]!r} stands twice in one object; only one of them can be meant.")
    return found


_decoder = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_object)
