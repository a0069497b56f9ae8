"""The options of each benchmark of `nanoflow bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow.analysis.lengths import BUILT_IN
from nanoflow.cli import options

AT_THE_SERVER = frozenset({"served_model_name"})
"""Options of the engine that here say something of the server at `--url` instead."""


def add_offline(parser: argparse.ArgumentParser) -> None:
    """All requests at once."""
    options.add_engine_options(parser, skip=AT_THE_SERVER)
    group = parser.add_argument_group("benchmark")
    add_workload(group, "512/512", several=True)
    group.add_argument("--requests", type=int, default=200, metavar="N", help="how many requests (default 200)")
    group.add_argument("--runs", type=int, default=3, metavar="N", help="measured repeats (default 3)")
    group.add_argument("--warmup", type=int, default=16, metavar="N", help="requests to run before (default 16)")
    add_traced(group, 5)
    add_endpoint(group)
    add_output(group)


def add_online(parser: argparse.ArgumentParser) -> None:
    """A sweep of request rates."""
    options.add_engine_options(parser, skip=AT_THE_SERVER)
    group = parser.add_argument_group("benchmark")
    add_workload(group, "sharegpt")
    group.add_argument("--rates", metavar="R,R,...", default="1", help="requests a second to measure (default 1)")
    group.add_argument(
        "--find",
        action="store_true",
        help="search the highest sustained rate within each of --limit-ms, from the best of --rates",
    )
    group.add_argument(
        "--seconds", type=float, metavar="X", default=60.0, help="seconds of arrivals at each rate (default 60)"
    )
    group.add_argument("--arrivals", choices=("poisson", "gamma", "trace"), default="poisson", help="default poisson")
    group.add_argument(
        "--burstiness", type=float, metavar="X", default=4.0, help="of gamma arrivals; 1 is Poisson (default 4)"
    )
    group.add_argument(
        "--limit-ms",
        default="200",
        metavar="X,X,...",
        help="allowed time an output token; with several each is judged, and searched for, on its own (default 200)",
    )
    group.add_argument(
        "--drain-seconds", type=float, metavar="X", default=60.0, help="wait for the last answers (default 60)"
    )
    group.add_argument("--warmup", type=int, default=8, metavar="N", help="requests to send before (default 8)")
    group.add_argument(
        "--resolution", type=float, metavar="X", default=0.1, help="when --find is done (default 0.1: 10 %%)"
    )
    add_endpoint(group)
    add_output(group)


def add_ablation(parser: argparse.ArgumentParser) -> None:
    """Variants in turn."""
    options.add_engine_options(parser)
    group = parser.add_argument_group("benchmark")
    add_workload(group, "512/512", several=True)
    group.add_argument("--requests", type=int, default=100, metavar="N", help="how many requests (default 100)")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each variant (default 3)")
    group.add_argument("--warmup", type=int, default=8, metavar="N", help="requests to run before (default 8)")
    add_traced(group, 3)
    group.add_argument(
        "--overlap",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an overlapping pipeline (default: the tuned one; repeatable: several have a row each)",
    )
    group.add_argument(
        "--variants",
        metavar="NAME,...",
        help="run these rows only, of sequential (always run), nano-batches, network, network+memory, memory, "
        "synchronous, tuned, kvoffload (default: all)",
    )
    group.add_argument("--tune", action="store_true", help="run nanoflow tune first where nothing is tuned")
    group.add_argument(
        "--search-seconds",
        type=float,
        metavar="X",
        default=45.0,
        help="search an overlapping pipeline for so long (default 45)",
    )
    group.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="OPTION=VALUE,...",
        help="also compare an engine with these options to the plain one (repeatable)",
    )
    add_output(group)


def add_multiround(parser: argparse.ArgumentParser) -> None:
    """Conversations."""
    options.add_engine_options(parser)
    group = parser.add_argument_group("benchmark")
    columns = "conv_id, turn, history_len, new_input_len, output_len"
    file = group.add_argument("--workload", type=Path, metavar="FILE.csv", help=f"a trace with the columns {columns}")
    options.add_old_name(group, "--trace", file)
    group.add_argument("--conversations", type=int, default=50, metavar="N", help="how many (default 50)")
    group.add_argument("--concurrent", type=int, default=32, metavar="N", help="at the same time (default 32)")
    group.add_argument(
        "--think-seconds", type=float, metavar="X", default=0.0, help="mean pause before the next round (default 0)"
    )
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="end a conversation before it grows longer")
    group.add_argument("--max-turns", type=int, metavar="N", help="end a conversation after so many rounds")
    group.add_argument("--runs", type=int, default=1, metavar="N", help="measured repeats of each (default 1)")
    add_output(group)


def add_workload(group: argparse._ArgumentGroup, default: str, *, several: bool = False) -> None:
    """What is sent; `several` workloads may be run by one command."""
    known = f"{', '.join(BUILT_IN)}, IN/OUT tokens, MEAN~DEVIATION for either, or a .csv trace (default {default}"
    if several:
        group.add_argument("--workload", action="append", metavar="W", help=f"{known}; repeatable)")
        group.set_defaults(default_workload=default)
    else:
        group.add_argument("--workload", default=default, metavar="W", help=f"{known})")
    for side, text in (
        ("total", "leave out requests with more tokens, prompt and output together"),
        ("prompt", "leave out requests with a longer prompt"),
        ("output", "leave out requests with a longer output"),
    ):
        group.add_argument(f"--max-{side}-tokens", type=int, metavar="N", help=text)


def add_traced(group: argparse._ArgumentGroup, default: int) -> None:
    """How many iterations are run again with a tracer."""
    text = f"iterations to trace, operation by operation, at the end (default {default})"
    traced = group.add_argument("--trace-iterations", type=int, default=default, metavar="N", help=text)
    options.add_old_name(group, "--trace", traced)


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Where to send it instead of to an engine of this process."""
    group.add_argument("--url", help="send to this server with OpenAI's API instead; MODEL then says which model it is")
    name = group.add_argument(
        "--served-model-name", dest="served_model", metavar="NAME", help="the model at --url (default: its first)"
    )
    options.add_old_name(group, "--served-model", name)
    group.add_argument("--api-key", metavar="KEY", help="the server's key (default: $NANOFLOW_API_KEY)")
    group.add_argument("--vocab-size", type=int, metavar="N", help="random token ids below this, for an unknown MODEL")


def add_output(group: argparse._ArgumentGroup) -> None:
    """Where the result goes."""
    group.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="PLACE",
        help="write the raw results to this .json file, or into a folder, after each round what there is",
    )
    group.add_argument("--page", type=Path, metavar="FILE.md", help="write a page with commands, table and text, too")
    group.add_argument("--json", action="store_true", help="print the results' JSON, a line each, and nothing else")
