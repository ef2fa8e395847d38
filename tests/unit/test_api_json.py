"""Request bodies as text. Python's own parser differs from version to version: each must give the same answers."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.errors import Problem
from app.api.strict_json import loads

# What may be stored: see test_bad_input.py for what may not.
strings = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner) | st.dictionaries(strings, inner),
    max_leaves=30,
)


@given(values, st.booleans())
def test_what_is_stored_is_what_was_sent(value: Any, ascii_only: bool) -> None:
    assert loads(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary() | st.text().map(str.encode) | st.text('{}[]",:0123456789.eE+-\\u nulltrefas').map(str.encode))
def test_any_bytes_are_a_value_or_a_problem(body: bytes) -> None:
    with suppress(Problem):
        json.dumps(loads(body), allow_nan=False).encode()


@pytest.mark.parametrize("depth", [1, 99, 100, 101, 500, 990, 1000, 3000, 10_000, 1_000_000])
@pytest.mark.parametrize(("opening", "inside", "closing"), [("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")])
def test_depth_is_limited_and_breaks_nothing(depth: int, opening: str, inside: str, closing: str) -> None:
    body = (opening * depth + inside + closing * depth).encode()
    if depth * len(closing) <= 100:
        loads(body)
    else:
        with pytest.raises(Problem, match="nested more than 100 levels") as refused:
            loads(body)
        assert refused.value.status_code == 422


@pytest.mark.parametrize(
    ("text", "value"),
    [("5.0", 5), ("-0.0", 0), ("1e3", 1000), ("1.5", 1.5), ("1e300", 1e300), ("9007199254740993.0", 2.0**53)],
)
def test_whole_numbers_are_integers_as_long_as_they_are_exact(text: str, value: float) -> None:
    read = loads(text.encode())
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63)])
def test_64_bits_fit(number: int) -> None:
    assert loads(str(number).encode()) == number


def test_the_smallest_float_is_no_error() -> None:
    assert loads(b"1e-400") == 0
    assert loads(str(math.nextafter(0, 1)).encode()) == math.nextafter(0, 1)
