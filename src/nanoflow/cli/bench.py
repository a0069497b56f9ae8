"""`nanoflow bench`: measure this engine, or any server with OpenAI's API, under a stated load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from nanoflow.cli import bench_options, options
from nanoflow.cli.bench_files import ResultFiles
from nanoflow.cli.parser import add_log_level
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError

if TYPE_CHECKING:
    from nanoflow.bench.endpoint import Endpoint
    from nanoflow.bench.result import BenchResult, ModelInfo, OnResult
    from nanoflow.bench.workloads import Limits, RequestSet

HELP = "measure throughput and latency, of this engine or of any OpenAI endpoint"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, text, declare, bench in (
        ("offline", "all requests at once: throughput", bench_options.add_offline, run_offline),
        ("online", "latency against request rate", bench_options.add_online, run_online),
        ("ablation", "what each technique brings, in turn", bench_options.add_ablation, run_ablation),
        ("multiround", "conversations: what KV reuse saves", bench_options.add_multiround, run_multiround),
    ):
        child = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_log_level(child, below=True)
        declare(child)
        child.set_defaults(bench=bench)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark, write its JSON, print its numbers."""
    from nanoflow.bench.show import lines_of

    files = ResultFiles(args.output, args.page, several=several_workloads(args))
    results: list[BenchResult] = args.bench(args, files.keep)
    for result in results:  # printed first: a full disk must not cost the numbers
        for line in [json.dumps(json.loads(result.to_json()))] if args.json else lines_of(result):
            print(line)
    files.finish(results)
    if args.output is not None and not args.json:
        for result in results:
            print(f"written to {files.place(result)}")
    return 0


def run_offline(args: argparse.Namespace, keep: OnResult) -> list[BenchResult]:
    """All requests at once, on this engine or at a URL."""
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.offline import Listeners, OfflineOptions, run_offline
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    settings = OfflineOptions(args.runs, config.model.seed, args.warmup, args.trace_iterations)
    workloads = workloads_of(args, config.model.seed)
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        if args.url is None:
            heard = Listeners(tell, note, keep)
            return run_offline(config, workloads, settings, command=command_line(), listeners=heard, show_progress=show)
        from nanoflow.bench.online_runs import offline_endpoint

        results = []
        for requests in workloads:
            endpoint, model, vocab_size = endpoint_of(args, config)
            done = offline_endpoint(
                endpoint,
                model,
                vocab_size,
                requests,
                settings,
                command=command_line(),
                on_progress=tell,
                on_result=keep,
            )
            results.append(done)
        return results


def run_online(args: argparse.Namespace, keep: OnResult) -> list[BenchResult]:
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
        limits_s=tuple(limit_ms / 1e3 for limit_ms in numbers_of("--limit-ms", args.limit_ms)),
        drain_s=args.drain_seconds,
        warmup=args.warmup,
        find=args.find,
        resolution=args.resolution,
    )
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        if args.url is None:
            result = online_in_process(
                config, settings, command=command_line(), on_progress=tell, on_result=keep, show_progress=show
            )
            return [result]
        endpoint, model, vocab_size = endpoint_of(args, config)
        result = online_endpoint(
            endpoint, model, vocab_size, settings, command=command_line(), on_progress=tell, on_result=keep
        )
        return [result]


def run_ablation(args: argparse.Namespace, keep: OnResult) -> list[BenchResult]:
    """Pipelines and loops on one engine, in turn; then engines with other options."""
    from nanoflow.bench.ablation import AblationOptions, run_ablation
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.offline import Listeners
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    workloads = workloads_of(args, config.model.seed)
    settings = AblationOptions(
        workload=named_workloads(args)[0],
        rounds=args.rounds,
        seed=config.model.seed,
        warmup=args.warmup,
        trace=args.trace_iterations,
        overlaps=tuple(args.overlap),
        search_seconds=args.search_seconds,
        tune=args.tune,
        compare={text: changes_of(text) for text in args.compare},
        variants=None if args.variants is None else tuple(args.variants.split(",")),
    )
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        heard = Listeners(bar.tasks if show else None, note, keep)
        return run_ablation(config, workloads, settings, command=command_line(), listeners=heard, show_progress=show)


def run_multiround(args: argparse.Namespace, keep: OnResult) -> list[BenchResult]:
    """Conversations with and without reuse of their KV cache."""
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.multiround import MultiroundOptions, run_multiround
    from nanoflow.bench.traces import read_conversations
    from nanoflow.cli.progress import TaskBar

    config = engine_config(args)
    if args.workload is None:
        raise ConfigError(
            "a trace of conversations is needed: give --workload FILE.csv (docs/benchmarks.md: its columns)."
        )
    settings = MultiroundOptions(
        conversations=args.conversations,
        concurrent=args.concurrent,
        think_s=args.think_seconds,
        runs=args.runs,
        seed=config.model.seed,
        max_total_tokens=args.max_total_tokens,
        max_turns=args.max_turns,
    )
    trace = read_conversations(args.workload)
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        tell = bar.tasks if show else None
        result = run_multiround(
            config,
            args.workload.stem,
            trace,
            settings,
            command=command_line(),
            on_progress=tell,
            on_result=keep,
            show_progress=show,
        )
        return [result]


def note(sentence: str) -> None:
    """Say that a run has ended: long benchmarks should not be silent where no bar is shown."""
    if not sys.stderr.isatty():
        print(sentence, file=sys.stderr, flush=True)


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


def changes_of(text: str) -> dict[str, object]:
    """`page_tokens=32,asynchronous=false` → the options with their values."""
    found: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--compare {text!r} must be OPTION=VALUE, such as page_tokens=32.")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """`1,2.5` → (1.0, 2.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} must be numbers with commas between, such as 1,2,4.") from None


def named_workloads(args: argparse.Namespace) -> list[str]:
    """What `--workload` said, once or several times."""
    return args.workload or [args.default_workload]


def several_workloads(args: argparse.Namespace) -> bool:
    """Whether the results are several."""
    return isinstance(args.workload, list) and len(args.workload) > 1


def workloads_of(args: argparse.Namespace, seed: int) -> list[RequestSet]:
    """The requests of every workload."""
    from nanoflow.bench.workloads import make_requests

    limits = limits_of(args)
    return [make_requests(text, args.requests, seed=seed, limits=limits) for text in named_workloads(args)]


def limits_of(args: argparse.Namespace) -> Limits:
    """The filter that the options ask for."""
    from nanoflow.bench.workloads import Limits

    return Limits(args.max_total_tokens, args.max_prompt_tokens, args.max_output_tokens)
