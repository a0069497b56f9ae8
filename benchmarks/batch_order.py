"""What the order of a batch is worth: one file sent in its own order, and in the order of `batch/order.py`.

Two loads on `smollm2`, each run in turns by `nanoflow batch run` with and without `--keep-order`, a process a run:
`prefix`, shuffled questions about some long texts, with KV memory for a few of the texts only; and `lengths`, short
prompts with log-normal answer lengths.

    python benchmarks/batch_order.py [--load prefix lengths] [--rounds 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

N_TEXTS, QUESTIONS, TEXT_WORDS = 24, 8, 220
WORDS = ("sea", "wind", "stone", "light", "paper", "river", "iron", "glass", "north", "summer", "bread", "voice")
LOADS = {
    "prefix": ["--kv-memory-bytes", str(48 << 20), "--max-running", "16"],
    "lengths": ["--kv-memory-bytes", str(256 << 20), "--max-running", "64"],
}


def prefix_load() -> Iterator[dict[str, Any]]:
    """`QUESTIONS` shuffled questions about each of `N_TEXTS` texts."""
    chance = random.Random(0)
    texts = [" ".join(chance.choice(WORDS) for _ in range(TEXT_WORDS)) for _ in range(N_TEXTS)]
    asked = [(text, i) for text in texts for i in range(QUESTIONS)]
    chance.shuffle(asked)
    for text, i in asked:
        yield {"prompt": f"{text}\nQuestion {i}:", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def lengths_load() -> Iterator[dict[str, Any]]:
    """Short prompts, answers of 2 to 300 tokens."""
    chance = random.Random(1)
    for i in range(320):
        tokens = min(300, 2 + int(chance.lognormvariate(2.5, 1.0)))
        yield {"prompt": f"{i}. Tell me", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def measure(load: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds and cached tokens of each run, by order."""
    source = folder / f"{load}.jsonl"
    bodies = prefix_load() if load == "prefix" else lengths_load()
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    runs: dict[str, list[dict[str, Any]]] = {"file": [], "ours": []}
    for number in range(rounds):
        for order, options in (("file", ["--keep-order"]), ("ours", [])):
            output = folder / f"{load}-{order}-{number}.jsonl"
            command = [sys.executable, "-m", "nanoflow.cli.main", "batch", "run", "smollm2", str(source), str(output)]
            command += [*LOADS[load], *options, "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
            runs[order].append(json.loads(done.stdout))
    seconds = {order: [round(run["seconds"], 2) for run in found] for order, found in runs.items()}
    return {
        "load": load,
        "requests": len(lines),
        "seconds": seconds,
        "file_over_ours": round(statistics.median(seconds["file"]) / statistics.median(seconds["ours"]), 3),
        "prompt_tokens": runs["ours"][0]["prompt_tokens"],
        "cached_tokens": {order: [run["cached_tokens"] for run in found] for order, found in runs.items()},
        "iterations": {order: [run["run"]["iterations"] for run in found] for order, found in runs.items()},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", nargs="+", choices=tuple(LOADS), default=list(LOADS), help="default: both")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each order (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a load instead of text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-order-") as name:
        for load in options.load:
            found = measure(load, Path(name), options.rounds)
            if options.json:
                print(json.dumps(found), flush=True)
                continue
            for key, value in found.items():
                print(f"{key.replace('_', ' '):16} {value}", flush=True)
            print()


if __name__ == "__main__":
    main()
