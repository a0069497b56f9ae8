"""The prefix index's own time: naming, looking up, inserting and giving back the pages of one long prompt.

Run with `python benchmarks/kv_index.py`; `--json` prints one object. Look-up and insert each count what a new request
pays, the naming of its pages included, although the engine names a prompt's pages once.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.kvcache.chain import begin, page_keys, root_key, tail_key
from nanoflow.kvcache.pages import PagePool

OTHERS = 8
"""Prompts of the same length that the index holds besides."""


def measure(n_tokens: int, page_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step over `rounds` fresh prompts."""
    rng = np.random.default_rng(0)
    root = root_key("benchmark")
    n_pages = n_tokens // page_tokens
    pool = PagePool((OTHERS + 2) * n_pages)
    times: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = run()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(rounds):
        tokens = rng.integers(0, 100_000, n_tokens).astype(np.int32)
        pages = timed("allocate, evicting others' pages", lambda: pool.allocate(n_pages))
        assert isinstance(pages, np.ndarray)

        def name(tokens: Int32Array = tokens) -> list[bytes]:
            return page_keys(begin(root), tokens, page_tokens)

        timed("insert", lambda name=name, pages=pages: pool.adopt(name(), pages))
        found = timed("look-up", lambda name=name: pool.lookup(name()))
        assert isinstance(found, np.ndarray) and len(found) == n_pages
        keys = timed("  of which naming", name)
        assert isinstance(keys, list)
        timed("  of which looking up", lambda keys=keys: pool.lookup(keys))
        timed("share", lambda pages=pages: pool.share(pages))
        timed("release twice", lambda pages=pages: (pool.release(pages), pool.release(pages)))
        timed("name of a half-full page", lambda tokens=tokens: tail_key(root, tokens[: page_tokens - 1]))
    return {
        name: {"median_ms": float(np.median(values)) * 1e3, "p99_ms": float(np.percentile(values, 99)) * 1e3}
        for name, values in times.items()
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of the prompt (default 32768)")
    parser.add_argument("--page-tokens", type=int, default=16, help="tokens of a page (default 16)")
    parser.add_argument("--rounds", type=int, default=200, help="prompts (default 200)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    steps = measure(options.tokens, options.page_tokens, options.rounds)
    if options.json:
        shape = {"tokens": options.tokens, "page_tokens": options.page_tokens, "rounds": options.rounds}
        print(json.dumps({"benchmark": "kv_index", "python": platform.python_version(), **shape, "steps": steps}))
        return
    print(f"{options.tokens} tokens in pages of {options.page_tokens}, {options.rounds} prompts")
    for name, figures in steps.items():
        print(f"  {name:34} median {figures['median_ms']:.3f} ms   p99 {figures['p99_ms']:.3f} ms")


if __name__ == "__main__":
    main()
