"""What the app answers between the signal and the end."""

from __future__ import annotations

import threading

import openai
import pytest
from tests.server.conftest import running_server
from tests.server.fake_engine import MODEL, FakeEngine


def test_draining_app_refuses_new_requests_and_is_unhealthy() -> None:
    with running_server(FakeEngine()) as server, server.http() as http:
        assert http.get("/health").status_code == 200
        server.server.config.loaded_app.state.server.draining = True
        assert http.get("/health").status_code == 503
        assert http.get("/metrics").status_code == 200
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "5"


def test_whole_answer_that_outlasts_the_drain_is_503() -> None:
    engine = FakeEngine(delay_s=0.02)
    with running_server(engine, drain_s=0.2) as server, server.openai() as client:
        stopper = threading.Timer(0.3, server.server.handle_exit, (15, None))
        stopper.start()
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client.completions.create(model=MODEL, prompt="x", max_tokens=3000)
        assert caught.value.status_code == 503
