"""Reading request bodies: JSON as RFC 8259 has it, within what PostgreSQL can store."""

import json
import math
from typing import Any, NoReturn

from app.api.errors import Problem

_LARGEST = 2**63 - 1


def _refuse(detail: str, status: int = 422) -> NoReturn:
    raise Problem(status, "unusable-json", "The JSON cannot be used", detail)


def _constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON; leave the value out or send null.")


def _integer(text: str) -> int:
    # Other languages read a larger one as a rounded float: two programs would see two values.
    if len(text) > 20 or not -_LARGEST - 1 <= (value := int(text)) <= _LARGEST:
        _refuse("An integer does not fit into 64 bits; send it as a string.")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse("A number is larger than a 64-bit float can hold.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        _refuse(f"The key {twice[:100]!r} stands twice in one object; only one of them can be meant.")
    return found


_decoder = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_object)


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
        _refuse(f"{error.msg} at line {error.lineno}, column {error.colno}.", 400)
    except RecursionError:
        _refuse("The JSON is nested too deep; a thousand levels is more than anybody needs.", 400)
    # Only escapes can bring these in: raw ones are no valid JSON or no valid UTF-8.
    if "\\u" in text:
        _check_strings(value)
    return value


def _check_strings(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "\x00" in item:
                _refuse("A string contains the character U+0000, which PostgreSQL cannot store.")
            if any("\ud800" <= character <= "\udfff" for character in item):
                _refuse("A string contains half of a surrogate pair, which is no character.")
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
