"""`/api/files`: uploads in, uploads and results out."""

import re
from typing import Any
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from uuid_utils.compat import uuid7

from app.api.auth import key_name
from app.api.errors import Problem, responses
from app.api.protocol import allow_pauses
from app.api.uploads import Upload
from app.api.within import within
from app.files import store
from app.files.store import FileStore

router = APIRouter(prefix="/api/files", tags=["files"], dependencies=[Depends(key_name)])


class File(BaseModel):
    """`size` in bytes, `sha256` in hex. The name is what the uploader called it."""

    id: UUID
    name: str
    size: int
    content_type: str
    sha256: str


_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
_CREATED = {
    "description": "The file is kept",
    "headers": {"Location": {"description": "Where the file is.", "schema": {"type": "string"}}},
}
_BYTES = {
    "description": "The file, with the content type that it was uploaded with",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


@router.post(
    "",
    status_code=201,
    responses={201: _CREATED, **responses(400, 401, 413, 415, 422, 503, 507)},
    openapi_extra=_MULTIPART,
)
async def upload_file(request: Request, response: Response) -> File:
    """Keeps a file, to be named in a job's payload by its id. A file that no job uses is removed some day."""
    files: FileStore = request.app.state.files
    sent = Upload(request, request.app.state.settings.max_upload_bytes)
    await sent.start()
    # Asked first: nobody should send a gigabyte to hear that it can't be kept.
    await within(files.check(), part="The storage of files")
    file_id = uuid7()
    # No time limit of ours: a large file from a slow client takes as long as it takes.
    size, sha256 = await files.write(file_id, sent.chunks())
    row = {"id": file_id, "name": sent.name, "size": size, "content_type": sent.content_type, "sha256": sha256}
    try:
        # The row comes last: it never speaks of bytes that are not there.
        [saved] = await within(request.app.state.query(store.INSERT, row))
    except BaseException:
        # Should PostgreSQL have kept the row all the same: nobody was told of it.
        await files.delete(file_id)
        raise
    response.headers["Location"] = f"/api/files/{file_id}"
    return File.model_validate(saved)


async def _find(request: Request, file_id: UUID) -> File:
    rows: list[dict[str, Any]] = await within(request.app.state.query(store.GET, {"id": file_id}))
    if not rows:
        raise Problem(404, "unknown-file", f"There is no file {file_id}; unused files are removed after some time.")
    return File.model_validate(rows[0])


@router.get("/{file_id}", responses=responses(401, 404, 422, 503))
async def get_file(request: Request, file_id: UUID) -> File:
    """What is known of a file."""
    return await _find(request, file_id)


@router.get(
    "/{file_id}/content", response_class=StreamingResponse, responses={200: _BYTES, **responses(401, 404, 422, 503)}
)
async def get_file_content(request: Request, file_id: UUID) -> StreamingResponse:
    """The bytes."""
    file = await _find(request, file_id)
    allow_pauses(request.scope)
    try:
        pieces = await within(request.app.state.files.read(file_id), part="The storage of files")
    except FileNotFoundError:
        raise Problem(404, "lost-file", f"The storage has lost the bytes of {file_id}; upload them again.") from None
    return StreamingResponse(
        pieces,
        headers={
            # Here and not as media_type, which would claim a charset.
            "Content-Type": file.content_type,
            "Content-Length": str(file.size),
            "ETag": f'"{file.sha256}"',
            # Whatever was uploaded: a browser saves it, and runs nothing that it may contain.
            "Content-Disposition": _attachment(file.name),
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox; default-src 'none'",
        },
    )


def _attachment(name: str) -> str:
    """RFC 6266: the name for everybody, and one in plain ASCII for those that don't read it (curl -J)."""
    plain = re.sub(r'[^ -~]|["\\%]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
