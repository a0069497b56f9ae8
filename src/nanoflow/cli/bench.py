"""`nanoflow bench`: measure this engine, or any server with OpenAI's API, under a stated load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.analysis.lengths import BUILT_IN
from nanoflow.cli import options
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError

if TYPE_CHECKING:
    from nanoflow.bench.endpoint import Endpoint
    from nanoflow.bench.result import BenchResult, ModelInfo
    from nanoflow.bench.workloads import Limits

HELP = "measure throughput and latency, of this engine or of any OpenAI endpoint"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    _add_offline(kinds.add_parser("offline", help="all requests at once: throughput", allow_abbrev=False))
    _add_online(kinds.add_parser("online", help="latency against request rate", allow_abbrev=False))
    _add_multiround(kinds.add_parser("multiround", help="conversations: what KV reuse saves", allow_abbrev=False))


def _add_offline(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)
    group = parser.add_argument_group("benchmark")
    add_workload(group, "512/512")
    group.add_argument("--requests", type=int, default=200, metavar="N", help="how many requests (default 200)")
    group.add_argument("--runs", type=int, default=3, metavar="N", help="measured repeats (default 3)")
    group.add_argument("--warmup", type=int, default=16, metavar="N", help="requests to run before (default 16)")
    group.add_argument("--trace", type=int, default=5, metavar="N", help="iterations to trace at the end (default 5)")
    add_endpoint(group)
    add_output(group)
    parser.set_defaults(bench=run_offline)


def _add_online(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)
    group = parser.add_argument_group("benchmark")
    add_workload(group, "sharegpt")
    group.add_argument("--rates", metavar="R,R,...", default="1", help="requests a second to measure (default 1)")
    group.add_argument(
        "--find", action="store_true", help="search the highest sustained rate, from the best of --rates"
    )
    group.add_argument("--seconds", type=float, default=60.0, help="seconds of arrivals at each rate (default 60)")
    group.add_argument("--arrivals", choices=("poisson", "gamma", "trace"), default="poisson", help="default poisson")
    group.add_argument("--burstiness", type=float, default=4.0, help="of gamma arrivals; 1 is Poisson (default 4)")
    group.add_argument(
        "--limit-ms", type=float, default=200.0, metavar="X", help="allowed time an output token (default 200)"
    )
    group.add_argument("--drain-seconds", type=float, default=60.0, help="wait for the last answers (default 60)")
    group.add_argument("--warmup", type=int, default=8, metavar="N", help="requests to send before (default 8)")
    group.add_argument("--resolution", type=float, default=0.1, help="when --find is done (default 0.1: 10 %%)")
    add_endpoint(group)
    add_output(group)
    parser.set_defaults(bench=run_online)


def _add_multiround(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)
    group = parser.add_argument_group("benchmark")
    columns = "conv_id, turn, history_len, new_input_len, output_len"
    group.add_argument("--trace", type=Path, metavar="FILE.csv", required=True, help=f"with the columns {columns}")
    group.add_argument("--conversations", type=int, default=50, metavar="N", help="how many (default 50)")
    group.add_argument("--concurrent", type=int, default=32, metavar="N", help="at the same time (default 32)")
    group.add_argument("--think-seconds", type=float, default=0.0, help="mean pause before the next round (default 0)")
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="end a conversation before it grows longer")
    group.add_argument("--max-turns", type=int, metavar="N", help="end a conversation after so many rounds")
    group.add_argument("--runs", type=int, default=1, metavar="N", help="measured repeats of each (default 1)")
    add_output(group)
    parser.set_defaults(bench=run_multiround)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark, write its JSON, print its numbers."""
    from nanoflow.bench.show import lines_of

    if args.output is not None and args.output.is_dir():
        args.output = args.output / f"{args.benchmark}.json"
    result: BenchResult = args.bench(args)
    if args.output is not None:
        result.save(args.output)
    if args.json:
        print(result.to_json())
        return 0
    for line in lines_of(result):
        print(line)
    if args.output is not None:
        print(f"written to {args.output}")
    return 0


def run_offline(args: argparse.Namespace) -> BenchResult:
    """All requests at once, on this engine or at a URL."""
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.offline import OfflineOptions, run_offline
    from nanoflow.bench.workloads import make_requests
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    settings = OfflineOptions(args.runs, config.model.seed, args.warmup, args.trace)
    requests = make_requests(args.workload, args.requests, seed=config.model.seed, limits=limits_of(args))
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        if args.url is None:
            return run_offline(config, requests, settings, command=command_line(), on_progress=tell, show_progress=show)
        from nanoflow.bench.online_runs import offline_endpoint

        endpoint, model, vocab_size = endpoint_of(args, config)
        return offline_endpoint(
            endpoint, model, vocab_size, requests, settings, command=command_line(), on_progress=tell
        )


def run_online(args: argparse.Namespace) -> BenchResult:
    """A sweep over request rates, on this engine or at a URL."""
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.online import OnlineOptions
    from nanoflow.bench.online_runs import online_endpoint, online_in_process
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    settings = OnlineOptions(
        workload=args.workload,
        rates=numbers_of("--rates", args.rates),
        seconds=args.seconds,
        seed=config.model.seed,
        arrivals=args.arrivals,
        burstiness=args.burstiness,
        limits=limits_of(args),
        limit_s=args.limit_ms / 1e3,
        drain_s=args.drain_seconds,
        warmup=args.warmup,
        find=args.find,
        resolution=args.resolution,
    )
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        if args.url is None:
            return online_in_process(config, settings, command=command_line(), on_progress=tell, show_progress=show)
        endpoint, model, vocab_size = endpoint_of(args, config)
        return online_endpoint(endpoint, model, vocab_size, settings, command=command_line(), on_progress=tell)


def run_multiround(args: argparse.Namespace) -> BenchResult:
    """Conversations with and without reuse of their KV cache."""
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.multiround import MultiroundOptions, run_multiround
    from nanoflow.bench.traces import read_conversations
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    settings = MultiroundOptions(
        conversations=args.conversations,
        concurrent=args.concurrent,
        think_s=args.think_seconds,
        runs=args.runs,
        seed=config.model.seed,
        max_total_tokens=args.max_total_tokens,
        max_turns=args.max_turns,
    )
    trace = read_conversations(args.trace)
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        return run_multiround(
            config, args.trace.stem, trace, settings, command=command_line(), on_progress=tell, show_progress=show
        )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's options; with a URL there must be none that this process could not apply."""
    given = options.engine_options(args)
    foreign = sorted(set(given) - {"model", "seed", "load_format"})
    if getattr(args, "url", None) is not None and foreign:
        raise ConfigError(f"{options.flag(foreign[0])} cannot be set at a URL; start that server with it.")
    return EngineConfig.from_options(**given)


def endpoint_of(args: argparse.Namespace, config: EngineConfig) -> tuple[Endpoint, ModelInfo, int]:
    """The endpoint, and what MODEL says of the model there: its vocabulary bounds the random token ids."""
    from dataclasses import asdict

    from nanoflow.bench.endpoint import Endpoint
    from nanoflow.bench.result import ModelInfo
    from nanoflow.core import env
    from nanoflow.models.registry import resolve_model

    endpoint = Endpoint(args.url, model=args.served_model, api_key=args.api_key or env.api_key())
    if args.vocab_size is not None:
        options.check_positive("vocab_size", args.vocab_size)
        return endpoint, ModelInfo(config.model.model), args.vocab_size
    spec = resolve_model(config.model.model, "random").spec
    return endpoint, ModelInfo(spec.name, "", args.url, spec.n_params, asdict(spec)), spec.vocab_size


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """`1,2.5` → (1.0, 2.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} must be numbers with commas between, such as 1,2,4.") from None


def add_workload(group: argparse._ArgumentGroup, default: str) -> None:
    """What is sent."""
    known = f"{', '.join(BUILT_IN)}, IN/OUT tokens, MEAN~DEVIATION for either, or a .csv trace (default {default})"
    group.add_argument("--workload", default=default, help=known)
    for side, text in (
        ("total", "leave out requests with more tokens, prompt and output together"),
        ("prompt", "leave out requests with a longer prompt"),
        ("output", "leave out requests with a longer output"),
    ):
        group.add_argument(f"--max-{side}-tokens", type=int, metavar="N", help=text)


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Where to send it instead of to an engine of this process."""
    group.add_argument("--url", help="send to this server with OpenAI's API instead; MODEL then says which model it is")
    group.add_argument("--served-model", metavar="NAME", help="its name at the server (default: the first it lists)")
    group.add_argument("--api-key", metavar="KEY", help="the server's key (default: $NANOFLOW_API_KEY)")
    group.add_argument("--vocab-size", type=int, metavar="N", help="random token ids below this, for an unknown MODEL")


def add_output(group: argparse._ArgumentGroup) -> None:
    """Where the result goes."""
    group.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the result, raw samples and all, here")
    group.add_argument("--json", action="store_true", help="print the result's JSON and nothing else")


def limits_of(args: argparse.Namespace) -> Limits:
    """The filter that the options ask for."""
    from nanoflow.bench.workloads import Limits

    return Limits(args.max_total_tokens, args.max_prompt_tokens, args.max_output_tokens)
