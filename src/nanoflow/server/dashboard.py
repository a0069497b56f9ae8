"""`/dashboard`: a page that shows the engine at work, and `/dashboard/events`, the server-sent events behind it.

The page is one file with its style and script inside, the same for everybody, so it needs no key; the events do. It
finds the events relative to its own address, so it works behind a proxy that serves it under a prefix.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from nanoflow import __version__
from nanoflow.analysis.svg.canvas import NARROW, STRIPES, WIDE, theme
from nanoflow.core.errors import PipelineError
from nanoflow.core.stats import WorkDone
from nanoflow.pipeline.gantt import Row, draw_gantt
from nanoflow.pipeline.known_times import known_timeline
from nanoflow.server.batch_service import BatchService
from nanoflow.server.delivery import SSE_HEADERS
from nanoflow.server.engine_api import Engine, served_model_name
from nanoflow.server.errors import encode_json
from nanoflow.server.feed import Feed
from nanoflow.server.guard import ServerState
from nanoflow.server.metrics import Metrics
from nanoflow.server.watch import report_or_none


def add_dashboard(app: Starlette, engine: Engine, state: ServerState, metrics: Metrics, batches: BatchService) -> Feed:
    """Add the two routes to `app`; returns what samples the engine."""
    feed = Feed(engine, metrics.latencies, batches)
    body, policy = _page()
    headers = {"content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff"}

    async def page(request: Request) -> Response:
        return Response(body, media_type="text/html; charset=utf-8", headers=headers)

    async def events(request: Request) -> Response:
        return StreamingResponse(_events(engine, state, feed), headers=_header_dict())

    app.add_route("/dashboard", page, ["GET"])
    app.add_route("/dashboard/", page, ["GET"])
    app.add_route("/dashboard/events", events, ["GET"])
    return feed


async def _events(engine: Engine, state: ServerState, feed: Feed) -> AsyncIterator[bytes]:
    """What is served, what was seen while others watched, then a sample an interval, until the server stops."""
    async with feed.watching():
        yield _event("hello", await asyncio.to_thread(describe, engine))
        yield _event("history", list(feed.history))
        while not state.draining:
            yield _event("sample", await feed.next())
        yield _event("bye", {})


def _event(name: str, value: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode_json(value) + b"\n\n"


def describe(engine: Engine) -> dict[str, Any]:
    """What does not change while the server runs: model, rates of the machine, the pipeline and its drawings."""
    report = report_or_none(engine, 1.0, WorkDone())
    rates = None if report is None else report.rates
    place = engine.config.device
    dtype = engine.config.model.dtype if rates is None else rates.dtype
    pipeline = engine.pipeline
    found: dict[str, Any] = {
        "version": __version__,
        "model": served_model_name(engine),
        "max_model_len": engine.max_model_len,
        "rates": None if rates is None else rates.to_dict(),
        "devices": 1 if report is None else report.devices,
        "pipeline": pipeline.name,
        "dense_batch": pipeline.dense_batch,
        "lanes": len(pipeline.lanes),
        "nano_ops": len(pipeline.nano_ops),
        "charts": [],
        "times": "Its times are not known; nanoflow tune measures them.",
    }
    try:
        known = known_timeline(
            pipeline, engine.spec, dtype, rates, ranks=place.tensor_parallel_size, devices=place.n_devices
        )
    except PipelineError as error:
        return found | {"times": f"Its times cannot be shown: {error}"}
    if known is not None:
        rows = [Row(pipeline.name, known.timeline)]
        found["charts"] = [draw_gantt(rows, WIDE, "wide"), draw_gantt(rows, NARROW, "narrow")]
        found["times"] = f"Times: {known.source}."
    return found


def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run nothing but what is in it and fetch from here alone."""
    assets = resources.files("nanoflow.server").joinpath("assets")
    page, style, script = (
        assets.joinpath(f"dashboard.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    style = theme() + style
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    for name, text in (("STYLE", style), ("SCRIPT", script), ("STRIPES", STRIPES)):
        page = page.replace(f"<!--{name}-->", text)
    return page.encode(), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header_dict() -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in SSE_HEADERS}
