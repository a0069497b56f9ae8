"""kill -9 for clients: do pages stay allocated when streaming clients die without a word?

Starts `nanoflow serve smollm2` as a process, then again and again a client process that streams a long answer and is
killed with SIGKILL once it has shown that tokens arrive. In the end no KV page may be in use (by `/metrics`), and the
next request must be answered.

    python benchmarks/client_kill_storm.py [--kills 200] [--at-once 10] [--json]

Exit code 1 if a page stayed allocated, a client never streamed, or the server did not answer or stop cleanly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

# A client in as few imports as can be: it says `x` when it has seen its tenth event, and reads on until it is killed.
CLIENT = """
import json, sys, urllib.request
body = {"prompt": sys.argv[2], "max_tokens": 1500, "stream": True, "ignore_eos": True, "n": int(sys.argv[3])}
request = urllib.request.Request(sys.argv[1] + "/v1/completions", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
with urllib.request.urlopen(request, timeout=120) as answer:
    for number, line in enumerate(answer):
        if number == 20:
            print("x", flush=True)
"""
FREED_WITHIN_S = 10.0


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process and its address, from the log line that names it until the block ends."""
    command = [sys.executable, "-m", "nanoflow.cli.main", "serve", "smollm2", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = ""
            for line in server.stderr:
                said += line
                if found := re.search(r"http://[\d.:]+", line):
                    break
            else:
                raise SystemExit(f"the server did not start:\n{said}")
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that its log never blocks it
            yield found[0], server
        finally:
            server.kill()


def metrics(url: str) -> dict[str, float]:
    """Every metric without labels, `nanoflow_` left out."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    plain = [line.split() for line in lines if line.startswith("nanoflow_") and "{" not in line]
    return {name.removeprefix("nanoflow_"): float(value) for name, value in plain}


def kill_one(url: str, index: int) -> bool:
    """Start a client and kill it mid-stream; whether it was streaming."""
    arguments = [url, "Once upon a time, " * (1 + index % 40), str(1 + index % 3)]
    with subprocess.Popen([sys.executable, "-I", "-c", CLIENT, *arguments], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        streaming = client.stdout.read(1) == b"x"
        time.sleep(random.Random(index).uniform(0, 0.05))
        client.send_signal(signal.SIGKILL)
        return streaming and client.wait() == -signal.SIGKILL


def storm(url: str, kills: int, at_once: int) -> dict[str, Any]:
    """Kill `kills` clients, up to `at_once` at a time, and look at what they left."""
    peak_pages = 0.0
    streamed: list[bool] = []
    numbers = iter(range(kills))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            streamed.append(kill_one(url, number))

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        peak_pages = max(peak_pages, metrics(url)["kv_pages_used"])
        time.sleep(0.1)
    stormed_s, ended = time.monotonic() - started, time.monotonic()
    left = metrics(url)
    while left["kv_pages_used"] and time.monotonic() - ended < FREED_WITHIN_S:
        time.sleep(0.01)
        left = metrics(url)
    return {
        "kills": kills,
        "killed_mid_stream": sum(streamed),
        "storm_s": round(stormed_s, 2),
        "peak_pages_used": int(peak_pages),
        "kv_pages": int(left["kv_pages"]),
        "pages_used_after": int(left["kv_pages_used"]),
        "requests_running_after": int(left["requests_running"]),
        "requests_waiting_after": int(left["requests_waiting"]),
        "freed_after_s": round(time.monotonic() - ended, 3),
        "disconnects_counted": int(left["client_disconnects_total"]),
    }


def ask(url: str) -> str:
    """The answer to a simple question."""
    body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def run(kills: int, at_once: int, options: list[str]) -> dict[str, Any]:
    """The whole experiment; `ok` tells whether all went as it should."""
    with served(*options) as (url, server):
        found = storm(url, kills, at_once)
        found["next_answer"] = ask(url)
        server.send_signal(signal.SIGTERM)
        found["exit_code"] = server.wait(timeout=60)
    found["ok"] = (
        found["killed_mid_stream"] == found["disconnects_counted"] == kills
        and found["peak_pages_used"] > 0
        and found["pages_used_after"] == found["requests_running_after"] == found["requests_waiting_after"] == 0
        and "Paris" in found["next_answer"]
        and found["exit_code"] == 0
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="clients to kill (default 200)")
    parser.add_argument("--at-once", type=int, default=10, help="clients that live at the same time (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, options = parser.parse_known_args()
    found = run(args.kills, args.at_once, options)
    if args.json:
        print(json.dumps(found))
        return 0 if found["ok"] else 1
    print("killed {killed_mid_stream} of {kills} clients mid-stream in {storm_s} s".format(**found))
    print("KV pages in use: at most {peak_pages_used} of {kv_pages}, then {pages_used_after}".format(**found))
    print("requests left: {requests_running_after} running, {requests_waiting_after} waiting".format(**found))
    print("disconnects counted: {disconnects_counted}; all freed {freed_after_s} s after the end".format(**found))
    print("next answer: {next_answer!r}; the server exited with {exit_code}".format(**found))
    print("ok" if found["ok"] else "NOT OK")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
