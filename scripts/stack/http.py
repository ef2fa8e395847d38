"""What `make up` asks the running stack before it says that it runs."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Callable

from scripts.stack import Problem, environment, say

# A proxy for the outside world must not see what is meant for this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def api_url(values: Mapping[str, str]) -> str:
    return f"http://127.0.0.1:{environment.port(values, 'API_PORT')}"


def key(values: Mapping[str, str]) -> str | None:
    """The key to show, or None where none is needed."""
    if values.get("APP_ENV", "local") == "local":
        return None
    return values.get("API_KEYS", "").split(",")[0].partition(":")[2].strip() or None


def call(url: str, body: Any = None, bearer: str | None = None) -> tuple[int, Any]:
    """One request; the answer's status and its JSON (or text). Status 0: nobody answered."""
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    try:
        with _opener.open(urllib.request.Request(url, data, headers), timeout=5) as answer:  # noqa: S310 - our own API
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except OSError as error:
        return 0, str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode(errors="replace")


def wait_for(what: str, ready: Callable[[], bool], seconds: float) -> None:
    """Poll until ready.

    Raises:
        Problem: after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise Problem(f"{what} did not come within {seconds:.0f} s.")
        time.sleep(0.1)


def smoke_job(values: Mapping[str, str], seconds: float = 60) -> None:
    """Hand in a real job over HTTP and wait until a worker has done it.

    Raises:
        Problem: when it was refused, failed, or did not end in time.
    """
    url, bearer, started = api_url(values), key(values), time.monotonic()
    job = {"kind": "text_report", "payload": {"text": "It works, and it works twice."}, "priority": "high"}
    status, answer = call(f"{url}/api/jobs", job, bearer)
    if status != 202:
        raise Problem(f"The API did not accept a first job: {status} {answer}")
    while answer.get("status") not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() - started > seconds:
            raise Problem(f"The first job is still `{answer.get('status')}` after {seconds:.0f} s: no worker took it?")
        time.sleep(0.1)
        status, body = call(f"{url}/api/jobs/{answer['id']}", None, bearer)
        answer = body if status == 200 else answer
    if answer["status"] != "succeeded":
        raise Problem(f"The first job ended as `{answer['status']}`: {answer.get('error')}")
    say(f"A first job succeeded after {time.monotonic() - started:.1f} s.")


def summary(values: Mapping[str, str], flower: bool = True) -> str:
    """The addresses, and a curl line that works as pasted."""
    url, bearer = api_url(values), key(values)
    lines = [
        "",
        f"  Dashboard  {url}",
        f"  API docs   {url}/docs",
    ]
    if flower:
        user = values["FLOWER_BASIC_AUTH"].partition(":")[0]
        flower_url = f"http://127.0.0.1:{environment.port(values, 'FLOWER_PORT')}"
        lines.append(f"  Flower     {flower_url}  (user {user}, password: FLOWER_BASIC_AUTH in .env)")
    # The key stays where it is instead of going through screens and shell histories.
    source = "printenv API_KEYS" if os.environ.get("API_KEYS") else "grep ^API_KEYS= .env | cut -d= -f2-"
    header = f'-H "Authorization: Bearer $({source} | cut -d, -f1 | cut -d: -f2-)" ' if bearer else ""
    payload = '{"kind": "text_report", "payload": {"text": "one two two"}}'
    lines += [
        "",
        "Hand in a job:",
        "",
        f"  curl -s {header}-H 'Content-Type: application/json' -d '{payload}' {url}/api/jobs",
        "",
        "More: make demo, make ps, make logs, make down",
    ]
    return "\n".join(lines)
