"""Does `nanoflow plan` predict what `nanoflow serve` does on this machine? Profile, calibrate, then measure rates.

Calibrations (`planning/calibration.py`: requests one by one, then a burst) and the rates (`nanoflow bench online`) take
turns; then exactly the same requests are simulated at the same arrival times. Nothing is fitted to the rates. Other
programs on the machine would be measured too, so a run begins when they are quiet, what they took during it is noted,
and medians are over the runs in which that was little. Run with `python benchmarks/plan_check.py`; see
benchmarks/README.md.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from nanoflow.bench.online import OnlineOptions
from nanoflow.bench.workloads import Limits, make_requests
from nanoflow.core.presets import preset
from nanoflow.planning.calibration import Loads, measure, solve
from nanoflow.planning.fleet import Objective, ReplicaKind, Traffic
from nanoflow.planning.plan import Question, engine_sizes, replica_kind
from nanoflow.planning.profiled import load_profile
from nanoflow.planning.times import Overheads, WithOverheads

MODEL = "smollm2"
COMPARED = ("tokens_per_s", "normalised_latency_mean_s", "time_per_output_token_mean_s", "ttft_mean_s")
WANTED = COMPARED[:2]
WITHIN = 0.15
WAIT_S = 25.0
CALIBRATION, OTHERS = "calibration", "others_percent"
Measured = dict[str, list[dict[str, float]]]
Solver = Callable[[Loads], Overheads]
PORT = 8931


def nanoflow(*words: str) -> list[str]:
    """A command line of this interpreter's nanoflow."""
    return [sys.executable, "-m", "nanoflow.cli.main", *words]


@contextlib.contextmanager
def server(threads: int) -> Iterator[tuple[str, int]]:
    """A server with the sequential pipeline and no prefix cache (rounds repeat prompts); it ends with the block."""
    url = f"http://127.0.0.1:{PORT}"
    words = ("serve", MODEL, "--port", str(PORT), "--pipeline", "sequential", "--no-enable-prefix-caching")
    words += ("--threads", str(threads))
    with subprocess.Popen(nanoflow(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                time.sleep(0.5)
            yield url, process.pid
        finally:
            process.terminate()


def profile(path: Path, limits: Limits, workload: str, threads: int) -> None:
    """Profile at the mean lengths of what will be sent."""
    some = make_requests(workload, 1000, limits=limits)
    lengths = f"{round(some.prompt_tokens.mean())}/{round(some.output_tokens.mean())}"
    words = ("profile", MODEL, "--quick", "--step", "8", "--workload", lengths, "-o", str(path))
    words += ("--threads", str(threads))
    subprocess.run(nanoflow(*words), check=True, stdout=subprocess.DEVNULL)


def online(url: str, options: argparse.Namespace, rate: float) -> dict[str, float]:
    """What `nanoflow bench online` measures at a rate."""
    words = ("bench", "online", MODEL, "--url", url, "--workload", options.workload, "--json", "--warmup", "2")
    limits = ("--max-prompt-tokens", str(options.max_prompt), "--max-output-tokens", str(options.max_output))
    load = ("--rates", f"{rate:g}", "--seconds", f"{options.seconds:g}")
    done = subprocess.run(nanoflow(*words, *limits, *load), check=True, stdout=subprocess.PIPE, text=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["series"][0]["numbers"]
    return numbers


class Others:
    """How much of the processors programs other than this one, its children and the server take."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._before = self._now()

    def percent(self) -> float:
        """Since the last call, of all processors; steps of a clock tick make it a little rough."""
        before, self._before = self._before, self._now()
        seconds, all_s, own_s = (now - then for now, then in zip(self._before, before, strict=True))
        return max(0.0, 100.0 * (all_s - own_s) / (seconds * (os.cpu_count() or 1)))

    def wait_until_quiet(self, quiet_percent: float, most_s: float) -> None:
        """Until the others have taken little for a second, or the time is over."""
        until = time.monotonic() + most_s
        self.percent()
        while time.monotonic() < until:
            time.sleep(1.0)
            if self.percent() <= quiet_percent:
                return

    def _now(self) -> tuple[float, float, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        served = Path(f"/proc/{self._server_pid}/stat").read_text().rpartition(")")[2].split()
        own = sum(os.times()[:4]) + (int(served[11]) + int(served[12])) / ticks
        return time.monotonic(), (user + nice + system + irq + softirq) / ticks, own


def measured_quietly(url: str, pid: int, options: argparse.Namespace, limits: Limits, solver: Solver) -> Measured:
    """Calibrations and rates in turn, until each has `rounds` undisturbed results or the time is over."""
    jobs: dict[str, Callable[[], dict[str, float]]] = {
        CALIBRATION: lambda: asdict(solver(measure(url, options.workload, limits, preset(MODEL).vocab_size)))
    }
    jobs |= {f"{rate:g}": lambda rate=rate: online(url, options, rate) for rate in options.rates}  # type: ignore[misc]
    found: Measured = {name: [] for name in jobs}
    others, until = Others(pid), time.monotonic() + options.minutes * 60
    while time.monotonic() < until:
        lacking = [name for name in jobs if len(quiet_ones(found[name], options.quiet)) < options.rounds]
        if not lacking:
            break
        name = min(lacking, key=lambda name: len(found[name]))
        others.wait_until_quiet(options.quiet, min(WAIT_S, max(0.0, until - time.monotonic())))
        others.percent()
        numbers = jobs[name]()
        found[name].append({**numbers, OTHERS: others.percent()})
        told = {key: round(numbers[key], 4) for key in (*COMPARED, *vars(Overheads())) if key in numbers}
        print(f"{name}: others {found[name][-1][OTHERS]:.0f} %, {told}", file=sys.stderr, flush=True)
    return found


def quiet_ones(runs: list[dict[str, float]], quiet_percent: float) -> list[dict[str, float]]:
    """Runs that other programs hardly disturbed."""
    return [run for run in runs if run[OTHERS] <= quiet_percent]


def used(runs: list[dict[str, float]], quiet_percent: float) -> list[dict[str, float]]:
    """The undisturbed runs; where there is none, the least disturbed one."""
    return quiet_ones(runs, quiet_percent) or sorted(runs, key=lambda run: run[OTHERS])[:1]


def predicted(
    kind: ReplicaKind, overheads: Overheads, options: argparse.Namespace, limits: Limits
) -> dict[str, dict[str, float]]:
    """What the simulation gives for the same requests at each rate."""
    slower = replace(kind, times=WithOverheads(kind.times, overheads), overheads=overheads)
    sent = OnlineOptions(options.workload, tuple(options.rates), options.seconds, limits=limits)
    return {f"{rate:g}": slower.run(sent.requests(rate, 0)).numbers() for rate in options.rates}


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values."""
    limits = Limits(None, options.max_prompt, options.max_output)
    path = options.profile or Path(options.folder) / "smollm2.profile.json"
    if options.profile is None:
        profile(path, limits, options.workload, options.threads)
    spec = preset(MODEL)
    traffic = Traffic(options.workload, limits=limits)
    question = Question(spec, "cpu", Objective(1.0, 1.0), traffic, profile=load_profile(path))
    kind = replica_kind(question, 1, engine_sizes(question))
    with server(options.threads) as (url, pid):
        measured = measured_quietly(url, pid, options, limits, lambda loads: solve(kind, loads))
    calibrations = used(measured.pop(CALIBRATION), options.quiet)
    middle = Overheads(*(median(one[name] for one in calibrations) for name in vars(Overheads())))
    return {
        "model": MODEL,
        "workload": options.workload,
        "rates": options.rates,
        "seconds": options.seconds,
        "threads": options.threads,
        "quiet_percent": options.quiet,
        "calibrations": calibrations,
        "overheads": asdict(middle),
        "measured": measured,
        "predicted": predicted(kind, middle, options, limits),
        "uncalibrated": predicted(kind, Overheads(), options, limits),
    }


def table(result: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines of a Markdown table, and whether every wanted number is within 15 %."""
    lines = [
        "| requests/s | runs, others | number | measured, median (least to most) | predicted | error | profile alone |",
        "|---|---|---|---|---|---|---|",
    ]
    good = True
    for rate in (f"{rate:g}" for rate in result["rates"]):
        runs = used(result["measured"][rate], result["quiet_percent"])
        share = f"{len(runs)} of {len(result['measured'][rate])}, {max(run[OTHERS] for run in runs):.0f} %"
        for name in COMPARED:
            values = sorted(run[name] for run in runs)
            said, plain = (result[kind][rate][name] for kind in ("predicted", "uncalibrated"))
            error = said / median(values) - 1.0
            good &= name not in WANTED or abs(error) <= WITHIN
            cells = (
                f"{median(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})",
                f"{said:.4g}",
                f"{100 * error:+.1f} %",
                f"{plain:.4g}",
            )
            lines.append(f"| {rate} | {share} | `{name}` | {' | '.join(cells)} |")
    return lines, good


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5, 3.0, 5.0], help="requests/s (1.5 3 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals at each rate (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="undisturbed repeats (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the server (default: all cores)")
    parser.add_argument(
        "--quiet", type=float, default=10.0, metavar="PERCENT", help="of all cores that others may take (default 10)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="to try for them (default 3)")
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
