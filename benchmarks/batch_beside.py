"""What a batch costs the people who use the same server, and they the batch: latencies alone and beside `/v1/batches`.

A server is started for each limit of `background_tokens`. On it take turns: `nanoflow bench online` alone, a batch
alone, and both at once. Tokens of the batch are what the engine computed less what the benchmark asked for. Run with
`python benchmarks/batch_beside.py`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoflow.bench.environment import versions

SHOWN = ("ttft_p50_s", "ttft_p99_s", "time_per_output_token_p50_s", "time_per_output_token_p99_s")
TOKENS = ("nanoflow_prompt_tokens_total", "nanoflow_output_tokens_total")
PREEMPTIONS = "nanoflow_preemptions_total"


def command(*words: str) -> list[str]:
    """A command line of this interpreter's nanoflow."""
    return [sys.executable, "-m", "nanoflow.cli.main", *words]


@contextlib.contextmanager
def server(options: argparse.Namespace, limit: str) -> Iterator[str]:
    """A server with its own data folder and no prefix cache (the same requests come twice); it ends with the block."""
    url = f"http://127.0.0.1:{options.port}"
    words = ["serve", options.model, "--port", str(options.port), "--no-enable-prefix-caching", *options.serve]
    words += [] if limit == "default" else ["--background-tokens", limit]
    with tempfile.TemporaryDirectory() as folder:
        told = subprocess.DEVNULL
        with subprocess.Popen(command(*words, "--data-dir", folder), stdout=told, stderr=told) as process:
            try:
                for _ in range(600):
                    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                        break
                    time.sleep(0.5)
                yield url
            finally:
                process.terminate()


def online(url: str, options: argparse.Namespace) -> dict[str, float]:
    """What `nanoflow bench online` measures, and how many tokens it had computed."""
    words = ["bench", "online", options.model, "--url", url, "--workload", options.workload, "--json", "--warmup", "4"]
    words += ["--rates", str(options.rate), "--seconds", str(options.seconds)]
    done = subprocess.run(command(*words), check=True, stdout=subprocess.PIPE, text=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["series"][0]["numbers"]
    return numbers


def scrape(url: str) -> dict[str, float]:
    """The counters that matter, and the time."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = {
        name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name.startswith("nano")
    }
    return {"at_s": time.monotonic(), "tokens": sum(found[name] for name in TOKENS), "preempted": found[PREEMPTIONS]}


def start_batch(url: str, options: argparse.Namespace) -> tuple[Any, str]:
    """Upload a file of questions and begin; returns the client and the batch's id once it has answers."""
    from openai import OpenAI

    body = {"max_tokens": options.answer_tokens, "temperature": 0, "ignore_eos": True}
    lines = []
    for number in range(options.lines):
        question = (
            f"Question {number}: which numbers between {number} and {2 * number + 7} are prime? Explain each step."
        )
        asked = body | {"messages": [{"role": "user", "content": question}]}
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": asked}
        lines.append(json.dumps(line).encode())
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    file = client.files.create(file=("beside.jsonl", b"\n".join(lines)), purpose="batch")
    window: Any = "24h"
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window)
    while (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed < 1:  # type: ignore[union-attr]
        time.sleep(0.2)
    return client, batch.id


def rate(before: dict[str, float], after: dict[str, float], others: float = 0.0) -> dict[str, float]:
    """Tokens a second of the batch between two scrapes, and how many choices were preempted."""
    seconds = after["at_s"] - before["at_s"]
    tokens = after["tokens"] - before["tokens"] - others
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "preemptions": after["preempted"] - before["preempted"],
    }


def measure(options: argparse.Namespace, limit: str) -> dict[str, Any]:
    """All three loads on a server of its own."""
    with server(options, limit) as url:
        before = scrape(url)
        alone = online(url, options)
        asked = scrape(url)["tokens"] - before["tokens"]  # the same requests, with their warm-up, come again
        client, batch_id = start_batch(url, options)
        before = scrape(url)
        time.sleep(options.batch_seconds)
        calm = rate(before, scrape(url))
        before = scrape(url)
        beside = online(url, options)
        busy = rate(before, scrape(url), asked)
        counts = client.batches.retrieve(batch_id).request_counts
        assert counts is not None and counts.completed < options.lines, "the batch ended too early; use more --lines"
        client.batches.cancel(batch_id)
    return {"limit": limit, "alone": alone, "beside": beside, "batch_alone": calm, "batch_beside": busy}


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown, a row a load."""
    lines = ["| background_tokens | load | TTFT p50, p99 ms | time per output token p50, p99 ms | batch tokens/s |"]
    lines.append("|---|---|---|---|---|")
    for case in cases:
        for load, batch in (("alone", "batch_alone"), ("beside", "batch_beside")):
            shown = [1e3 * case[load][name] for name in SHOWN]
            told = f"| {shown[0]:.0f}, {shown[1]:.0f} | {shown[2]:.1f}, {shown[3]:.1f} "
            lines.append(f"| {case['limit']} | {load} {told}| {case[batch]['tokens_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limits", nargs="+", default=["default"], help="values of background_tokens, or `default`")
    parser.add_argument("--workload", default="64/48", help="of the interactive requests (default 64/48)")
    parser.add_argument("--rate", type=float, default=0.5, help="interactive requests a second (default 0.5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of interactive arrivals (default 60)")
    parser.add_argument("--batch-seconds", type=float, default=20.0, help="of the batch alone (default 20)")
    parser.add_argument("--lines", type=int, default=500, help="of the batch's file (default 500)")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of each of its answers (default 128)")
    parser.add_argument("--port", type=int, default=8932)
    parser.add_argument("--json", type=Path, help="write the raw numbers to this file")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of nanoflow serve")
    options = parser.parse_args()
    cases = []
    for limit in options.limits:
        cases.append(measure(options, limit))
        print(table(cases[-1:]), file=sys.stderr, flush=True)
    print(table(cases))
    if options.json:
        machine = {"system": platform.platform(), "cores": os.cpu_count()}
        result = {"command": sys.argv, "machine": machine, "versions": versions(), "cases": cases}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
