"""The ASGI application: which path answers what. `create_app` is the whole of it."""

from __future__ import annotations

import difflib
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from nanoflow import __version__
from nanoflow.server.batch_ledger import BatchCollector
from nanoflow.server.batch_service import BatchService
from nanoflow.server.batches import add_batches
from nanoflow.server.config import ServerConfig
from nanoflow.server.dashboard import add_dashboard
from nanoflow.server.endpoints import generation_endpoints, unknown_model
from nanoflow.server.engine_api import Engine, served_model_name
from nanoflow.server.errors import ApiError, encode_json, shutting_down
from nanoflow.server.files import add_files
from nanoflow.server.guard import KNOWN_PATHS, Guard, ServerState
from nanoflow.server.metrics import Metrics


def create_app(engine: Engine, server_config: ServerConfig) -> FastAPI:
    """The OpenAI-compatible API over a running engine; `app.state.server` is its `ServerState`.

    `app.state.batches` is its `BatchService`; who runs the app calls its `start` and `stop`.
    """
    metrics = Metrics(engine)
    state = ServerState()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = state
    endpoints = generation_endpoints(engine, server_config, metrics)
    for path, endpoint in endpoints.items():
        app.add_route(path, endpoint, ["POST"])  # type: ignore[arg-type]
    app.state.batches = BatchService(engine, endpoints, server_config)
    metrics.registry.register(BatchCollector(app.state.batches))
    add_files(app, app.state.batches.store, server_config)
    add_batches(app, app.state.batches, server_config, served_model_name(engine))
    _add_information(app, engine, state, metrics)
    app.state.feed = add_dashboard(app, engine, state, metrics, app.state.batches)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_middleware(Guard, config=server_config, metrics=metrics, state=state)
    return app


def _add_information(app: FastAPI, engine: Engine, state: ServerState, metrics: Metrics) -> None:
    model = served_model_name(engine)
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "nanoflow"}
    card |= {"max_model_len": engine.max_model_len}

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        if name != model:
            raise unknown_model(name, model)
        return _json(card)

    @app.get("/health")
    async def health() -> Response:
        if state.draining:
            raise shutting_down()
        if not engine.healthy:
            raise ApiError(503, "The engine has stopped; the server must be restarted.", code="engine_unavailable")
        return _json({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _json(value: Any) -> Response:
    return Response(encode_json(value), media_type="application/json")


async def _routing_error(request: Request, exc: Exception) -> Response:
    """Unknown paths and methods; raised again as an `ApiError` for `Guard`."""
    assert isinstance(exc, HTTPException)
    path = request.url.path[:200]
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        message = f"{path} does not take {request.method}; use {allowed}."
        raise ApiError(405, message, code="method_not_allowed", headers=dict(exc.headers or {}))
    root = any(known.startswith(path.rstrip("/") + "/") for known in KNOWN_PATHS)
    near = [] if root else difflib.get_close_matches(path, KNOWN_PATHS, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KNOWN_PATHS)}."
    raise ApiError(exc.status_code, f"There is nothing at {path}; {hint}", code="not_found")
