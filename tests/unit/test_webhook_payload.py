"""What a webhook job may ask for, and what is shown of it."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.jobs.kinds.webhook import KIND, Payload


def payload(**fields: Any) -> Payload:
    return Payload.model_validate({"url": "https://example.com/hook", "body": {}} | fields)


@pytest.mark.parametrize("body", [None, True, 0, 1.5, "text", [], {"a": [None, {"b": "ä"}]}])
def test_any_json_is_a_body(body: object) -> None:
    assert payload(body=body).model_dump(mode="json")["body"] == body


def test_a_body_is_required() -> None:
    with pytest.raises(ValidationError, match="Field required"):
        Payload.model_validate({"url": "https://example.com/"})


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.com/", "'http' or 'https'"),
        ("file:///etc/passwd", "'http' or 'https'"),
        ("example.com", "valid URL"),
        ("http://", "valid URL"),
        ("http://[::1%25lo]/", "invalid IPv6 address"),
        ("http://[fe80::1%lo]/", "invalid IPv6 address"),
        ("http://256.0.0.1/", "invalid IPv4 address"),
        ("http://example.com:99999/", "invalid port"),
        ("http://exa mple.com/", "valid URL"),
        ("http://user:secret@example.com/", "Authorization header"),
        ("http://user@example.com/", "Authorization header"),
        ("http://:secret@example.com/", "Authorization header"),
        ("https://example.com/" + "a" * 2100, "at most 2083"),
    ],
)
def test_these_urls_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        payload(url=url)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://2130706433/x", "http://127.0.0.1/x"),
        ("HTTPS://EXAMPLE.com:443", "https://example.com/"),
        ("https://bücher.example/ä?q=ö", "https://xn--bcher-kva.example/%C3%A4?q=%C3%B6"),
        ("http://example.com:8080/a%2Fb?c=d%26e", "http://example.com:8080/a%2Fb?c=d%26e"),
        ("http://example.com/?a[]=1&b=x|y", "http://example.com/?a[]=1&b=x|y"),
    ],
)
def test_the_job_shows_the_address_that_is_really_called(url: str, kept: str) -> None:
    assert payload(url=url).model_dump(mode="json")["url"] == kept


@pytest.mark.parametrize(
    "name",
    [
        "Host",
        "host",
        "CONTENT-TYPE",
        "Content-Length",
        "content-anything",
        "Transfer-Encoding",
        "connection",
        "Idempotency-Key",
        "IDEMPOTENCY-KEY",
    ],
)
def test_headers_that_are_ours_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="is set by the service"):
        payload(headers={name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("X Y", "x"),
        ("X:", "x"),
        ("X\r\nHost", "x"),
        ("X-Ä", "x"),
        ("X\n", "x"),
        ("X", "a\r\nHost: b"),
        ("X", "a\n"),
        ("X", "a\0"),
        ("X", " a"),
        ("X", "a "),
        ("X", "ä"),
        ("X", "a" * 9000),
        ("X" * 300, "a"),
    ],
)
def test_a_header_can_not_smuggle_another_request(name: str, value: str) -> None:
    with pytest.raises(ValidationError):
        payload(headers={name: value})


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="given twice"):
        payload(headers={"X-A": "1", "x-a": "2"})


def test_too_many_headers_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most 50"):
        payload(headers={f"X-{n}": "" for n in range(51)})


def test_credentials_are_not_shown_in_any_spelling() -> None:
    given = {
        "AUTHORIZATION": "Bearer s3cret",
        "Cookie": "s3cret",
        "Proxy-Authorization": "s3cret",
        "X-A": "b",
    }
    stored = payload(headers=given).model_dump(mode="json")
    shown = KIND.shown(stored)
    assert shown["headers"] == {
        "AUTHORIZATION": "***",
        "Cookie": "***",
        "Proxy-Authorization": "***",
        "X-A": "b",
    }
    assert stored["headers"] == given, "the stored payload is what the worker sends: it must keep them"
    assert shown | {"headers": None} == stored | {"headers": None}


@pytest.mark.parametrize("stored", [{}, {"headers": {}}, {"headers": None}])
def test_a_payload_without_headers_is_shown_as_it_is(stored: dict[str, Any]) -> None:
    assert KIND.shown(stored) == stored
