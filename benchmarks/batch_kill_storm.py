"""kill -9 for batch jobs: is an answer ever lost, repeated or changed?

Runs `nanoflow batch run smollm2` over short greedy requests once without a kill. Then runs the same input again and
kills it with SIGKILL at random moments, after each of which the same command goes on. The killed job's output must have
every id once and the very answers of the first run, and must never lose an answer that it held.

    python benchmarks/batch_kill_storm.py [--requests 2000] [--kills 5] [--seed 0] [--folder DIR] [--json]

Exit code 1 if an answer was lost, repeated or changed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOUNS = ("time", "water", "light", "house", "river", "music", "stone", "paper", "winter", "garden", "ocean", "forest")


def make_input(path: Path, n: int, seed: int) -> None:
    """`n` short requests, two chats to one completion, of 2 to 10 answer tokens."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            body: dict[str, Any] = {"temperature": 0, "max_tokens": chance.randint(2, 10)}
            if i % 3:
                url = "/v1/chat/completions"
                body["messages"] = [{"role": "user", "content": f"One word about {chance.choice(NOUNS)} {i}?"}]
            else:
                url = "/v1/completions"
                body["prompt"] = f"{i}. The {chance.choice(NOUNS)} is"
            line = {"custom_id": f"request-{i}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(line) + "\n")


def choices(output: Path) -> dict[str, Any]:
    """custom_id → choices and token counts, which follow from the model. Raises `ValueError` if an id occurs twice."""
    found: dict[str, Any] = {}
    for raw in output.read_bytes().splitlines():
        line = json.loads(raw)
        if line["custom_id"] in found:
            raise ValueError(f"{line['custom_id']} occurs twice")
        body = line["response"]["body"]
        found[line["custom_id"]] = (body["choices"], body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
    return found


def whole_lines(output: Path) -> set[str]:
    """Ids of the answers that are in the output in full."""
    data = output.read_bytes() if output.exists() else b""
    return {json.loads(line)["custom_id"] for line in data.splitlines(keepends=True) if line.endswith(b"\n")}


def run(folder: Path, requests: int, kills: int, seed: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """The whole trial; `ok` says whether nothing was lost, repeated or changed."""
    chance = random.Random(seed)
    source, calm, stormy = (folder / file for file in ("in.jsonl", "calm.jsonl", "stormy.jsonl"))
    make_input(source, requests, seed)
    command = [sys.executable, "-m", "nanoflow.cli.main", "batch", "run", "smollm2", str(source)]
    _finish([*command, str(calm), *options])
    calm_s = _seconds(calm)
    held: set[str] = set()
    at_kill, kept = [], True
    for _ in range(kills):
        killed = kill_midway([*command, str(stormy), *options], stormy, chance.random() * calm_s / (kills + 1))
        now = whole_lines(stormy)
        kept = kept and held <= now
        held = now
        if killed:
            at_kill.append(len(now))
    _finish([*command, str(stormy), *options])
    expected, found = choices(calm), choices(stormy)
    changed = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return {
        "benchmark": "batch_kill_storm",
        "ok": kept and not changed and found.keys() == expected.keys() and len(found) == requests,
        "requests": requests,
        "killed": len(at_kill),
        "answers_at_each_kill": at_kill,
        "answers": len(found),
        "missing": len(expected.keys() - found.keys()),
        "changed": len(changed),
        "an_answer_was_lost": not kept,
        "uninterrupted_s": round(calm_s, 1),
    }


def _seconds(output: Path) -> float:
    command = [sys.executable, "-m", "nanoflow.cli.main", "batch", "status", str(output), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


def kill_midway(command: list[str], output: Path, delay_s: float) -> bool:
    """Start, wait until it adds answers, then `delay_s` longer, and kill. False if it ended before."""
    before = output.stat().st_size if output.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not output.exists() or output.stat().st_size <= before):
        time.sleep(0.01)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def _finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}{done.stdout}")


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="lines of the input (default 2000)")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and the moments (default 0)")
    parser.add_argument("--folder", type=Path, help="work and leave the files here; an uninterrupted run in it is used")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options, engine_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="batch-kill-storm-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options.requests, options.kills, options.seed, engine_options)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):24} {value}")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
