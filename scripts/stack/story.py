"""One job's lines out of the logs of all services, in the order of time: `make logs JOB=ID`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from scripts.stack import Problem

JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.\d]*")


def show(lines: Iterable[tuple[str, str]], wanted: str) -> None:
    """Prints what `lines` (service, line) say of a job, by its id or by its request's id.

    Raises:
        Problem: nothing.
    """
    found = of(lines, wanted)
    if not found:
        raise Problem(
            f"No line in the logs speaks of {wanted}.",
            "Logs are bounded: what is older is gone. Where the job is now: make task ARGS='status ID'",
        )
    width = max(len(service) for service, _ in found)
    for service, line in found:
        print(f"{service:{width}}  {_readable(line)}")


def of(lines: Iterable[tuple[str, str]], wanted: str) -> list[tuple[str, str]]:
    """What speaks of a job, and its request's lines; of another job of the same request, nothing."""
    lines = list(lines)
    fields = [_fields(line) for _, line in lines]
    ours = [wanted in line for _, line in lines]
    requests = {each.get("request_id") for each, is_ours in zip(fields, ours) if is_ours} - {None, ""}
    if JOB_ID.fullmatch(wanted):
        # Lines of somebody who only looked at it (GET) have requests of their own, with nothing else in them.
        others = [each.get("job_id") not in (None, wanted) for each in fields]
    else:
        requests, others = {wanted}, [False] * len(lines)
    chosen, moment = [], ""
    for (service, line), each, is_ours, is_other in zip(lines, fields, ours, others):
        seen = TIME.search(str(each.get("timestamp") or line))
        # A line without a time, such as one of a traceback, belongs to the one before it.
        moment = seen.group().replace(" ", "T") if seen else moment
        if is_ours or (each.get("request_id") in requests and not is_other):
            chosen.append((moment, service, line))
    return [(service, line) for _, service, line in sorted(chosen, key=lambda each: each[0])]


def _fields(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _readable(line: str) -> str:
    fields = _fields(line)
    if "message" not in fields:
        return line
    moment = str(fields.pop("timestamp", ""))[11:23]
    text = f"{moment}  {fields.pop('message')}"
    fields.pop("level", None)
    trace = fields.pop("exception", None)
    text += "".join(f"  {name}={value}" for name, value in fields.items())
    return f"{text}\n{trace}" if trace else text
