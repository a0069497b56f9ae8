"""`/v1/files`: upload the input of a batch, list, look at, download and delete files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import send_json
from nanoflow.server.errors import ApiError, bad_request, encode_json
from nanoflow.server.store import Page, Store, StoredFile
from nanoflow.server.upload import receive_form

INPUT_PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"
MAX_PAGE = 10_000
_UPLOAD_FIELDS = ("file", "purpose")

StoreSource = Callable[[], Store]
"""Opens the server's store, once; raises `ApiError` 503 where it cannot be had."""


def add_files(app: FastAPI, store: StoreSource, config: ServerConfig) -> None:
    """Add the paths under `/v1/files`."""
    app.add_route("/v1/files", _Upload(store, config), ["POST"])  # type: ignore[arg-type]

    @app.get("/v1/files")
    async def list_files(request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        page = page_of(request, ("purpose",))
        return listing(store().list_files(page, purpose), page, StoredFile.shown)

    @app.get("/v1/files/{file_id}")
    async def retrieve_file(file_id: str) -> Response:
        return json_response(find_file(store(), file_id).shown())

    @app.get("/v1/files/{file_id}/content")
    async def file_content(file_id: str) -> Response:
        file = find_file(store(), file_id)
        return FileResponse(store().path(file.id), media_type="application/jsonl", filename=file.filename)

    @app.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str) -> Response:
        file = find_file(store(), file_id)
        reader = store().needed_by(file.id)
        if reader is not None:
            message = f"{file.id} is the input of {reader}, which has not ended; cancel that first."
            raise ApiError(409, message, code="file_in_use")
        store().delete_file(file.id)
        return json_response({"id": file.id, "object": "file", "deleted": True})


class _Upload:
    """`POST /v1/files`; owns `receive`, so the file goes to disk as it arrives."""

    def __init__(self, store: StoreSource, config: ServerConfig) -> None:
        self._store = store
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        store = self._store()
        form = await receive_form(scope, receive, self._config, store.new_upload())
        try:
            file = store.add_file(form.path, form.filename or "", _purpose(form.fields))
        finally:
            form.discard()
        await send_json(send, 200, encode_json(file.shown()))


def _purpose(fields: dict[str, str]) -> str:
    for name in fields:
        if name not in _UPLOAD_FIELDS:
            raise bad_request(f"Unknown form field {name[:100]!r}; send file and purpose only.", name[:100])
    if fields.get("purpose") != INPUT_PURPOSE:
        raise bad_request(f"purpose must be {INPUT_PURPOSE!r}; files are the input of batches here.", "purpose")
    return INPUT_PURPOSE


def find_file(store: Store, file_id: str) -> StoredFile:
    """The file, or a 404."""
    file = store.find_file(file_id)
    if file is None:
        raise ApiError(404, f"There is no file {file_id[:100]!r}; list them with GET /v1/files.", code="not_found")
    return file


def page_of(request: Request, more: Sequence[str] = (), default_limit: int = MAX_PAGE, most: int = MAX_PAGE) -> Page:
    """Paging as the query asks for it: `limit`, `after`, `order`. Raises a 400 for anything but these and `more`."""
    query = request.query_params
    for name in query:
        if name not in ("limit", "after", "order", *more):
            raise bad_request(f"Unknown parameter {name[:100]!r}; remove it.", name[:100], "unknown_field")
    limit = query.get("limit", str(default_limit))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise bad_request(f"limit must be a whole number from 1 to {most}.", "limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request("order must be asc or desc.", "order")
    return Page(int(limit), query.get("after"), order == "asc")


def listing(items: Sequence[Any] | None, page: Page, shown: Callable[[Any], dict[str, Any]]) -> Response:
    """OpenAI's list object over the items of a page and perhaps one more."""
    if items is None:
        raise bad_request(f"after names {str(page.after)[:100]!r}, which does not exist; leave it out.", "after")
    data = [shown(item) for item in items[: page.limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return json_response({"object": "list", "data": data, **ends, "has_more": len(items) > page.limit})


def json_response(value: Any) -> Response:
    """200 with a JSON object."""
    return Response(encode_json(value), media_type="application/json")
