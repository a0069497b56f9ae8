"""Does `nanoflow plan` predict what `nanoflow serve` does on this machine? Profile, calibrate, then measure rates.

The profile and the calibration (`planning/calibration.py`: requests one by one, then a burst) are taken first in every
round; the rates are then measured by `nanoflow bench online` and simulated with exactly the same requests and arrival
times. Medians over rounds on both sides. Nothing is fitted to the rates. Run with `python benchmarks/plan_check.py`;
see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from nanoflow.bench.online import OnlineOptions
from nanoflow.bench.workloads import Limits, make_requests
from nanoflow.core.presets import preset
from nanoflow.planning.calibration import measure, solve
from nanoflow.planning.fleet import Objective, ReplicaKind, Traffic
from nanoflow.planning.plan import Question, engine_sizes, replica_kind
from nanoflow.planning.profiled import load_profile
from nanoflow.planning.times import Overheads, WithOverheads

MODEL = "smollm2"
COMPARED = ("tokens_per_s", "normalised_latency_mean_s", "time_per_output_token_mean_s", "ttft_mean_s")
WANTED = COMPARED[:2]
WITHIN = 0.15
PORT = 8931


def nanoflow(*words: str) -> list[str]:
    """A command line of this interpreter's nanoflow."""
    return [sys.executable, "-m", "nanoflow.cli.main", *words]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server with the sequential pipeline and no prefix cache (rounds repeat prompts); it ends with the block."""
    url = f"http://127.0.0.1:{PORT}"
    words = ("serve", MODEL, "--port", str(PORT), "--pipeline", "sequential", "--no-enable-prefix-caching")
    with subprocess.Popen(nanoflow(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def profile(path: Path, limits: Limits, workload: str) -> None:
    """Profile at the mean lengths of what will be sent."""
    some = make_requests(workload, 1000, limits=limits)
    lengths = f"{round(some.prompt_tokens.mean())}/{round(some.output_tokens.mean())}"
    words = ("profile", MODEL, "--quick", "--step", "8", "--workload", lengths, "-o", str(path))
    subprocess.run(nanoflow(*words), check=True, stdout=subprocess.DEVNULL)


def online(url: str, options: argparse.Namespace) -> dict[float, dict[str, float]]:
    """What `nanoflow bench online` measures at each rate."""
    words = ("bench", "online", MODEL, "--url", url, "--workload", options.workload, "--json")
    limits = ("--max-prompt-tokens", str(options.max_prompt), "--max-output-tokens", str(options.max_output))
    load = ("--rates", ",".join(f"{rate:g}" for rate in options.rates), "--seconds", f"{options.seconds:g}")
    done = subprocess.run(nanoflow(*words, *limits, *load), check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return {series["rate_rps"]: series["numbers"] for series in result["series"]}


def predicted(kind: ReplicaKind, overheads: Overheads, options: argparse.Namespace, limits: Limits) -> dict[float, Any]:
    """What the simulation gives for the same requests at each rate."""
    with_them = ReplicaKind(
        kind.spec, kind.dtype, kind.group, WithOverheads(kind.times, overheads), kind.engine, overheads
    )
    sent = OnlineOptions(options.workload, tuple(options.rates), options.seconds, limits=limits)
    return {rate: with_them.run(sent.requests(rate, number)).numbers() for number, rate in enumerate(options.rates)}


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values."""
    limits = Limits(None, options.max_prompt, options.max_output)
    path = options.profile or Path(options.folder) / "smollm2.profile.json"
    if options.profile is None:
        profile(path, limits, options.workload)
    spec = preset(MODEL)
    traffic = Traffic(options.workload, limits=limits)
    question = Question(spec, "cpu", Objective(1.0, 1.0), traffic, profile=load_profile(path))
    kind = replica_kind(question, 1, engine_sizes(question))
    found, measured = [], []
    with server() as url:
        for number in range(options.rounds):
            loads = measure(url, options.workload, limits, spec.vocab_size)
            found.append(solve(kind, loads))
            measured.append(online(url, options))
            print(f"round {number + 1}: {found[-1]}", file=sys.stderr, flush=True)
            for rate, numbers in measured[-1].items():
                told = {name: round(numbers[name], 4) for name in COMPARED}
                print(f"  {rate:g}/s: {told}", file=sys.stderr, flush=True)
    middle = Overheads(*(median(getattr(one, name) for one in found) for name in vars(Overheads())))
    return {
        "model": MODEL,
        "workload": options.workload,
        "rates": options.rates,
        "seconds": options.seconds,
        "load_average": os.getloadavg(),
        "calibrations": [asdict(one) for one in found],
        "overheads": asdict(middle),
        "measured": [{str(rate): numbers for rate, numbers in one.items()} for one in measured],
        "predicted": {str(rate): numbers for rate, numbers in predicted(kind, middle, options, limits).items()},
        "uncalibrated": {str(rate): numbers for rate, numbers in predicted(kind, Overheads(), options, limits).items()},
    }


def table(result: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines of a Markdown table, and whether every wanted number is within 15 %."""
    lines = [
        "| requests/s | number | measured, median (least to most) | predicted | error | without calibration |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    for rate in result["rates"]:
        for name in COMPARED:
            values = sorted(one[str(float(rate))][name] for one in result["measured"])
            said, plain = (result[kind][str(float(rate))][name] for kind in ("predicted", "uncalibrated"))
            error = said / median(values) - 1.0
            good &= name not in WANTED or abs(error) <= WITHIN
            cells = (
                f"{median(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})",
                f"{said:.4g}",
                f"{100 * error:+.1f} %",
            )
            lines.append(f"| {rate:g} | `{name}` | {' | '.join(cells)} | {plain:.4g} |")
    return lines, good


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="requests/s (default 1 3 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals at each rate (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="repeats (default 3)")
    parser.add_argument("--workload", default="sharegpt")
    parser.add_argument("--max-prompt", type=int, default=256, help="longest prompt in tokens (default 256)")
    parser.add_argument("--max-output", type=int, default=96, help="longest answer in tokens (default 96)")
    parser.add_argument("--profile", type=Path, help="a profile to use instead of measuring one")
    parser.add_argument("--folder", default=".", help="where the measured profile goes (default here)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    options.rates = sorted(set(options.rates))
    result = check(options)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    lines, good = table(result)
    print("\n".join(lines))
    print(f"\noverheads: {result['overheads']}")
    print(f"every throughput and mean latency within {100 * WITHIN:.0f} %: {good}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
