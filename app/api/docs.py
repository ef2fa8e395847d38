"""`/docs`: what /openapi.json says, for people. A page of our own, which needs neither scripts nor another host."""

import json
import re
from typing import Any

from fastapi import APIRouter, Request, Response

from app.web.templating import page

router = APIRouter(include_in_schema=False)


def _schemas(of: Any) -> list[str]:
    """The names of the schemas that are referred to."""
    return sorted(set(re.findall(r"#/components/schemas/([^\"/]+)", json.dumps(of))))


def _operation(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {})
    return {
        "tag": operation["tags"][0],
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "text": operation.get("description", ""),
        "open": not operation.get("security"),
        "parameters": operation["parameters"],
        "body": {kind: _schemas(content) for kind, content in body.items()},
        "answers": [
            {"status": status, "text": answer["description"], "schemas": _schemas(answer.get("content"))}
            for status, answer in operation["responses"].items()
        ],
    }


@router.get("/docs")
async def docs(request: Request) -> Response:
    """All operations, and the schemas they speak of."""
    document = request.app.openapi()
    operations = [
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    groups: dict[str, list[Any]] = {}
    for operation in operations:
        groups.setdefault(operation["tag"], []).append(operation)
    context = {"info": document["info"], "groups": groups, "schemas": document["components"]["schemas"]}
    return page(request, "docs.html", context)
