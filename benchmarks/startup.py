"""From the command to the first token: where the time of a start goes.

Each part is measured in a process of its own kind: a bare `import torch`, then a fresh engine with everything (imports,
weights from the cache, first token), then the command line as a user starts it. The first round may still fill caches
(converted weights, compiled kernels, measured rates, the disk's), so it is shown apart.

    python benchmarks/startup.py [MODEL] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

ENGINE = """
import json, sys, time
started = time.perf_counter()
import torch
torch_s = time.perf_counter()
from nanoflow.engine.llm import LLM
from nanoflow.core.sampling import SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1], show_progress=False)
loaded = time.perf_counter()
llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)
first = time.perf_counter()
print(json.dumps({
    "import torch": torch_s - started, "import nanoflow": imported - torch_s,
    "load": loaded - imported, "first token": first - loaded,
}))
llm.shutdown()
"""


def one_round(model: str) -> dict[str, float]:
    """Seconds of each part, of the process that has them, and of a whole `nanoflow generate`."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ENGINE, model], capture_output=True, text=True, check=True)
    process_s = time.perf_counter() - started
    parts: dict[str, float] = json.loads(done.stdout)
    parts["interpreter and exit"] = process_s - sum(parts.values())
    parts["whole process"] = process_s
    command = [sys.executable, "-m", "nanoflow.cli.main", "generate", model, "--prompt", "Hello", "--max-tokens", "1"]
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    parts["nanoflow generate, 1 token"] = time.perf_counter() - started
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="what to start (default smollm2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the first (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    first = one_round(args.model)
    later = [one_round(args.model) for _ in range(args.rounds)]
    found: dict[str, Any] = {
        part: {
            "first_s": round(first[part], 3),
            "median_s": round(statistics.median(r[part] for r in later or [first]), 3),
        }
        for part in first
    }
    if args.json:
        print(json.dumps({"model": args.model, "rounds": args.rounds, "parts": found}))
        return 0
    print(f"{args.model}, seconds{'':<13}{'first round':>12}{f'median of {args.rounds}':>14}")
    for part, times in found.items():
        print(f"{part:<30}{times['first_s']:>12.2f}{times['median_s']:>14.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
