"""`/v1/batches`: create, look at, list and cancel. The work is done by `BatchService`."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoflow.server.batch_records import new_record, parse_create
from nanoflow.server.batch_service import BatchService
from nanoflow.server.body import read_json_object
from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import send_json
from nanoflow.server.errors import bad_request, encode_json
from nanoflow.server.files import INPUT_PURPOSE, find_file, json_response, listing, page_of

DEFAULT_PAGE = 20
MAX_PAGE = 100


def add_batches(app: FastAPI, service: BatchService, config: ServerConfig, model: str) -> None:
    """Add the paths under `/v1/batches`."""
    app.add_route("/v1/batches", _Create(service, config, model), ["POST"])  # type: ignore[arg-type]

    @app.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        page = page_of(request, (), DEFAULT_PAGE, MAX_PAGE)
        return listing(service.store().list_batches(page), page, service.shown)

    @app.get("/v1/batches/{batch_id}")
    async def retrieve_batch(batch_id: str) -> Response:
        return json_response(service.shown(service.find(batch_id)))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str) -> Response:
        return json_response(service.cancel(batch_id))


class _Create:
    """`POST /v1/batches`."""

    def __init__(self, service: BatchService, config: ServerConfig, model: str) -> None:
        self._service = service
        self._config = config
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        asked = parse_create(await read_json_object(scope, receive, self._config), tuple(service.endpoints))
        file = find_file(service.store(), asked.input_file_id)
        if file.purpose != INPUT_PURPOSE:
            raise bad_request(f"{file.id} is the output of a batch; name an uploaded file.", "input_file_id")
        record = new_record(asked, self._model)
        service.store().add_batch(record, service.identity)
        service.wake()
        await send_json(send, 200, encode_json(record))
