"""`nanoflow serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse

from nanoflow.cli import options
from nanoflow.cli.engines import start_engine
from nanoflow.core.config import EngineConfig
from nanoflow.core.stats import WorkDone
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.server.config import ServerConfig

HELP = "serve a model over HTTP, as OpenAI's API"
LOG_LEVEL = "INFO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_engine_options(parser)
    options.add_dataclass_options(parser.add_argument_group("server"), ServerConfig)
    options.add_dataclass_options(parser.add_argument_group("replicas on Ray"), ScaleoutConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    config = EngineConfig.from_options(**options.engine_options(args))
    server_config = ServerConfig(**options.chosen(args, ServerConfig))
    scaleout = ScaleoutConfig(**options.chosen(args, ScaleoutConfig))
    from nanoflow.server.run import listen, serve
    from nanoflow.server.watch import report_or_none

    listen(server_config).close()  # a port that is taken must not come to light after minutes of loading
    engine = start_engine(config, scaleout)
    try:
        report_or_none(engine, 1.0, WorkDone())  # measures a new machine now, not under load for the dashboard
        serve(engine, server_config)
    finally:
        engine.close()
    return 0
