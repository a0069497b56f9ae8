"""`nanoflow plan`: how many GPUs, which TP degree and how many replicas meet a request rate within a latency limit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.analysis.lengths import BUILT_IN
from nanoflow.cli import options
from nanoflow.cli.analyze import THIS_CPU, spec_of
from nanoflow.cli.files import make_folder_of
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware_presets import HARDWARE
from nanoflow.core.model_spec import DTYPE_BYTES

if TYPE_CHECKING:
    from nanoflow.planning.plan import Question
    from nanoflow.planning.times import Overheads

HELP = "find how many GPUs, which TP degree and how many replicas meet a request rate within a latency limit"
LOG_LEVEL = "WARNING"
EXIT_NOT_MET = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="preset, model folder, config.json or .gguf file")
    names = f"{THIS_CPU} (this machine), {', '.join(HARDWARE)}"
    parser.add_argument("--gpu", "--hardware", dest="gpu", metavar="NAME", required=True, help=names)
    lengths = f"{', '.join(BUILT_IN)}, IN/OUT tokens, MEAN~DEVIATION for either, or a .csv trace"
    workload = parser.add_argument("--workload", metavar="W", default="sharegpt", help=f"{lengths} (default sharegpt)")
    options.add_old_name(parser, "--trace", workload)
    parser.add_argument("--rate", type=float, required=True, metavar="R", help="requests a second over all replicas")
    parser.add_argument("--slo", type=float, required=True, metavar="MS", help="limit: milliseconds an output token")
    parser.add_argument("--ttft-slo", type=float, metavar="MS", help="limit: milliseconds to the first token")
    parser.add_argument(
        "--slo-on", choices=("mean", "p50", "p90", "p99"), default="mean", help="what is limited (default mean)"
    )
    parser.add_argument("--tp", metavar="N,N,...", help="tensor-parallel degrees to try (default 1,2,4,8; cpu: 1)")
    parser.add_argument("--replicas", type=int, metavar="N", help="ask about so many replicas instead of the fewest")
    _add_traffic(parser.add_argument_group("traffic"))
    _add_engine(parser.add_argument_group("engine"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON object to this file")


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--arrivals", choices=("poisson", "gamma", "trace"), default="poisson", help="default poisson")
    group.add_argument(
        "--burstiness", type=float, metavar="X", default=4.0, help="of gamma arrivals; 1 is Poisson (default 4)"
    )
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave out requests with a longer prompt")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="leave out requests with a longer answer")
    group.add_argument("--requests", type=int, default=2000, metavar="N", help="simulate at most so many (2000)")
    group.add_argument("--simulate", type=int, default=1, metavar="K", help="representative replicas (default 1)")
    group.add_argument("--seed", type=int, metavar="N", default=0, help="of lengths and arrivals (default 0)")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="precision (default bfloat16)")
    group.add_argument("--dense-batch", type=int, metavar="N", help="tokens of an iteration (default: the engine's)")
    group.add_argument("--max-running", type=int, metavar="N", help="requests at once (default: the engine's)")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest request (default: the model's context)")
    group.add_argument("--profile", type=Path, metavar="FILE", help="times of nanoflow profile (cpu: the tuned one's)")
    group.add_argument("--pipeline", type=Path, metavar="FILE", help="with a profile: plan for this pipeline")
    group.add_argument("--efficiency", type=float, metavar="X", help="part of the rates that is reached (0 to 1)")
    group.add_argument("--link-gb", type=float, metavar="X", help="link between devices, GB/s one way")
    group.add_argument("--calibration", type=Path, metavar="FILE", help="overheads measured before")
    group.add_argument("--calibrate", metavar="URL", help="measure the overheads at this server (to --calibration)")


def run(args: argparse.Namespace) -> int:
    """Plan, print; exit code 1 if no option meets the limits."""
    from nanoflow.planning.plan import make_plan

    if args.output is not None:
        make_folder_of(args.output)
    plan = make_plan(_question(args), lambda words: print(words, file=sys.stderr, flush=True))
    text = json.dumps(plan)
    if args.output is not None:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        print_plan(plan)
    return 0 if plan["cheapest"] is not None else EXIT_NOT_MET


_COUNTED = (("gpus", "GPU"), ("replicas", "replica"))


def print_plan(plan: dict[str, Any]) -> None:
    """The options as a table, the cheapest in a sentence, the assumptions below."""
    print(
        f"{plan['model']} in {plan['dtype']} on {plan['gpu']}: {plan['rate_rps']:g} requests/s of {plan['workload']}, "
        f"{plan['slo_statistic']} of at most {plan['slo_ms_per_token']:g} ms an output token"
    )
    print(
        f"{'TP':>3}{'REPLICAS':>9}{'GPUS':>7}{'TOKENS/S':>11}{'MS/TOKEN':>10}{'P99':>8}{'TTFT MS':>9}{'P99':>8}"
        f"{'LOAD':>7}{'FILL':>7}{'OF BOUND':>16}{'KV TOKENS':>12}  "
    )
    for row in plan["options"]:
        print(_line(row))
    best = plan["cheapest"]
    if best is None:
        print("no option meets the limits")
    else:
        gpus, replicas = (f"{best[what]} {word}{'s' * (best[what] != 1)}" for what, word in _COUNTED)
        print(f"cheapest: {gpus}, {replicas} of TP {best['tp']}")
    print(f"times: {plan['options'][0]['times']}")
    for sentence in plan["assumptions"]:
        print(f"assumed: {sentence}")


def _line(row: dict[str, Any]) -> str:
    head = f"{row['tp']:>3}"
    if "tokens_per_s" not in row:
        return f"{head}  {row['reason']}"
    bound = f"{row['percent_of_bound']:.0f} % {row['bound']}"
    verdict = "meets" if row["meets"] else (row["reason"] or ("queue grows" if row["queue_grows"] else "too slow"))
    return (
        f"{head}{row['replicas']:>9}{row['gpus']:>7}{row['tokens_per_s']:>11.0f}"
        f"{1e3 * row['normalised_latency_mean_s']:>10.1f}{1e3 * row['normalised_latency_p99_s']:>8.1f}"
        f"{1e3 * row['ttft_mean_s']:>9.0f}{1e3 * row['ttft_p99_s']:>8.0f}{row['utilisation_percent']:>6.0f}%"
        f"{row['batch_fill_percent']:>6.0f}%{bound:>16}{row['kv_tokens']:>12}  {verdict}"
    )


def _question(args: argparse.Namespace) -> Question:
    from nanoflow.bench.workloads import Limits
    from nanoflow.pipeline.pipeline import Pipeline
    from nanoflow.planning.fleet import Objective, Traffic
    from nanoflow.planning.plan import Question, tuned_profile_path
    from nanoflow.planning.profiled import load_profile

    spec = spec_of(args.model)
    gpu = args.gpu.lower()
    path = args.profile
    if path is None and gpu == THIS_CPU:
        path = tuned_profile_path(spec.name, args.dtype)
    limits = Limits(None, args.max_prompt_tokens, args.max_output_tokens)
    if args.requests < 1:
        raise ConfigError(f"--requests must be at least 1, not {args.requests}.")
    question = Question(
        spec=spec,
        gpu=gpu,
        objective=Objective(
            args.rate, args.slo / 1e3, None if args.ttft_slo is None else args.ttft_slo / 1e3, args.slo_on
        ),
        traffic=Traffic(args.workload, args.arrivals, args.burstiness, limits, args.seed, args.requests),
        dtype=args.dtype,
        degrees=None if args.tp is None else _degrees(args.tp),
        replicas=args.replicas,
        dense_batch=args.dense_batch,
        max_running=args.max_running,
        max_model_len=args.max_model_len,
        profile=None if path is None else load_profile(path),
        pipeline=None if args.pipeline is None else Pipeline.load(args.pipeline),
        efficiency=args.efficiency,
        link_bytes_per_s=None if args.link_gb is None else args.link_gb * 1e9,
        simulated=args.simulate,
    )
    return _calibrated(question, args.calibrate, args.calibration)


def _calibrated(question: Question, url: str | None, path: Path | None) -> Question:
    """The question with overheads that were measured now, or before."""
    from dataclasses import replace

    from nanoflow.planning.calibration import calibrate, load_overheads, save_overheads

    if url is None and path is None:
        return question
    if url is None:
        assert path is not None
        return replace(question, overheads=load_overheads(path))
    overheads: Overheads = calibrate(question, url)
    if path is not None:
        save_overheads(overheads, path)
    return replace(question, overheads=overheads)


def _degrees(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--tp {text!r} must be whole numbers with commas between, such as 1,2,4.") from None
