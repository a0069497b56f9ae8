"""`serve` over a slow fake engine, as a program: `python -m tests.server.serve_fake PORT DRAIN_S`."""

from __future__ import annotations

import logging
import sys

from tests.server.fake_engine import FakeEngine

from nanoflow.server.config import ServerConfig
from nanoflow.server.run import serve

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    serve(FakeEngine(delay_s=0.02), ServerConfig(port=int(sys.argv[1]), drain_s=float(sys.argv[2])))
