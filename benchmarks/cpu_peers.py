"""SmolLM2 in bfloat16 on this CPU: nanoflow beside transformers, vLLM and llama.cpp, all in one run.

Each engine lives in a process of its own, loads once and warms up; then rounds go over the engines in turn, so that a
slow minute of the machine hits all of them. A peer that is not installed is skipped, with the reason. Run with
`python benchmarks/cpu_peers.py`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peer_workers import WORKERS

FIRST_TOKEN, LAST_TOKEN = 100, 40_000


@dataclass(frozen=True)
class Case:
    """A row of the table: `count` requests of `n_in` prompt tokens and `n_out` answer tokens."""

    count: int
    n_in: int
    n_out: int
    counts_input: bool

    @property
    def name(self) -> str:
        return f"{self.count}x({self.n_in}+{self.n_out})"

    def prompts(self, turn: int) -> list[list[int]]:
        """Random prompts: the same for every engine, others in every round, so that no prefix cache helps."""
        rng = np.random.default_rng((self.count, turn))
        return rng.integers(FIRST_TOKEN, LAST_TOKEN, (self.count, self.n_in)).tolist()

    def tokens_per_s(self, seconds: float) -> float:
        """Input and output tokens a second, or output tokens where the row is about one stream."""
        return self.count * (self.n_out + (self.n_in if self.counts_input else 0)) / seconds


CASES = {
    "64": Case(64, 128, 128, counts_input=True),
    "16": Case(16, 512, 64, counts_input=True),
    "1": Case(1, 32, 128, counts_input=False),
}


class Peer:
    """An engine in its own process, spoken to by JSON lines."""

    def __init__(self, name: str, threads: int, folder: str) -> None:
        self.name = name
        source = Path(__file__).resolve().parent.parent / "src"
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PEER_FOLDER": folder,
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, "--worker", name, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        self.version = str(self._answer()["version"])

    def run(self, case: Case, turn: int) -> dict[str, Any]:
        """One timed round."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": case.prompts(turn), "n_out": case.n_out}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"exit code {self.process.wait()}"}
        if "error" in answer:
            self.close()
            raise RuntimeError(answer["error"])
        return answer


def serve(name: str, threads: int) -> None:
    """The worker's side: load, then answer each case with its time. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        worker = WORKERS[name](threads)
    except ImportError as error:
        _say(answers, {"error": f"not installed ({error})"})
        return
    except Exception as error:
        _say(answers, {"error": f"did not load: {type(error).__name__}: {error}"})
        return
    _say(answers, {"version": worker.version})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            started = time.perf_counter()
            result = worker.generate(job["prompts"], job["n_out"])
            seconds = time.perf_counter() - started
            expected = len(job["prompts"]) * job["n_out"]
            if result["n_out"] != expected:
                raise RuntimeError(f"made {result['n_out']} tokens instead of {expected}")
            notes = worker.notes() if hasattr(worker, "notes") else {}
            _say(answers, {"seconds": seconds, **notes})
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
            return


def _say(stream: IO[str], answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def compare(names: list[str], cases: list[Case], rounds: int, threads: int) -> dict[str, Any]:
    """Run everything; returns versions, skipped peers and figures by case and engine."""
    skipped: dict[str, str] = {}
    peers: list[Peer] = []
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {case.name: {} for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                peers.append(Peer(name, threads, folder))
            except RuntimeError as error:
                skipped[name] = str(error)
                print(f"{name}: skipped, {error}", file=sys.stderr)
        for case in cases:
            for turn in range(rounds + 1):
                for peer in list(peers):
                    try:
                        answer = peer.run(case, turn)
                    except (RuntimeError, OSError) as error:
                        peers.remove(peer)
                        skipped[peer.name] = f"failed at {case.name}: {error}"
                        print(f"{peer.name}: {skipped[peer.name]}", file=sys.stderr)
                        continue
                    if turn > 0:  # the first round warms up
                        answers[case.name].setdefault(peer.name, []).append(answer)
                    rate = case.tokens_per_s(answer["seconds"])
                    kind = "warm-up" if turn == 0 else f"round {turn}"
                    print(f"{case.name} {kind}: {peer.name} {rate:.0f} tokens/s", file=sys.stderr)
        versions = {peer.name: peer.version for peer in peers}
        for peer in peers:
            peer.close()
    rows = [{"case": case.name, "engines": _figures(case, answers[case.name])} for case in cases]
    machine = {"platform": platform.platform(), "python": platform.python_version(), "threads": threads}
    return {"benchmark": "cpu_peers", "machine": machine, "versions": versions, "skipped": skipped, "rows": rows}


def _figures(case: Case, by_engine: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, answers in by_engine.items():
        rates = [case.tokens_per_s(answer["seconds"]) for answer in answers]
        figures[name] = {
            "tokens_per_s": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "seconds": [answer["seconds"] for answer in answers],
        }
        if "percent_of_bound" in answers[-1]:
            figures[name]["percent_of_bound"] = statistics.median(answer["percent_of_bound"] for answer in answers)
            figures[name]["bound"] = answers[-1]["bound"]
    return figures


def print_table(result: dict[str, Any], cases: list[Case]) -> None:
    """Median (min to max) by case and engine."""
    for case, row in zip(cases, result["rows"], strict=True):
        print(f"{case.name}, {'input + output' if case.counts_input else 'output'} tokens/s")
        for name, figures in row["engines"].items():
            bound = (
                f"   {figures['percent_of_bound']:.0f} % of the {figures['bound']} bound" if "bound" in figures else ""
            )
            spread = f"({figures['min']:.1f} to {figures['max']:.1f})"
            print(f"  {name:14}{figures['tokens_per_s']:9.1f}  {spread}{bound}")
    for name, reason in result["skipped"].items():
        print(f"{name}: skipped, {reason}")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES), help="rows by number of requests")
    parser.add_argument("--peers", nargs="+", choices=WORKERS, default=list(WORKERS), help="engines to run")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one warm-up (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each engine (default 2)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.threads)
        return
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    cases = [CASES[name] for name in options.rows]
    result = compare(options.peers, cases, options.rounds, options.threads)
    print_table(result, cases)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
