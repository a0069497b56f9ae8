"""What structured output costs: compiling, one mask, putting masks on logits, and decode steps with and without.

    OMP_NUM_THREADS=2 python benchmarks/structured_masks.py [--quick]

With the real small model and its vocabulary, on the CPU. Masks are those along a text that follows the schema, token
by token as the tokenizer cuts it. Decode steps are timed with every request free, one of them guided, and all of them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from nanoflow import LLM, SamplingParams, StructuredOutput
from nanoflow.kernels.reference_sampling import keep_allowed
from nanoflow.text.grammars import Grammars, advance

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["river", "lake", "sea"]},
        "length_km": {"type": "number"},
        "countries": {"type": "array", "items": {"type": "string"}, "maxItems": 9},
        "navigable": {"type": "boolean"},
    },
    "required": ["name", "kind", "length_km", "countries", "navigable"],
    "additionalProperties": False,
}
TEXT = (
    '{"name": "Danube (Donau, Duna, Dunărea)", "kind": "river", "length_km": 2850.5, "countries": ["Germany", '
    '"Austria", "Slovakia", "Hungary", "Croatia", "Serbia", "Romania"], "navigable": true}'
)
WANTED = {
    "schema": (StructuredOutput(json=SCHEMA), TEXT),
    "any object": (StructuredOutput(json_object=True), TEXT),
    "expression": (StructuredOutput(regex=r"([A-Z][a-z]+ ){5,20}[0-9]{4}"), "Every Good Boy Deserves Fine Music 2026"),
    "choice": (StructuredOutput(choice=[f"number {i}" for i in range(100)]), "number 42"),
}


def masks(llm: LLM, repetitions: int) -> None:
    """Time to compile, and time a token to advance and find the next mask, alone and 32 at once."""
    submission = llm._engine.submission
    vocabulary = time.perf_counter()
    Grammars(submission.tokenizer, llm.spec.vocab_size, submission.eos_ids)._known_vocabulary()
    print(f"vocabulary of {llm.spec.vocab_size} tokens, once: {time.perf_counter() - vocabulary:.2f} s")
    print(f"{'':12} {'compile':>10} {'tokens':>7} {'mask, mean':>11} {'99 %':>9} {'32 at once, each':>17}")
    for name, (wanted, text) in WANTED.items():
        tokens = llm.tokenizer.encode(text, add_special_tokens=False)
        took: list[float] = []
        together: list[float] = []
        for _ in range(repetitions):
            made = Grammars(submission.tokenizer, llm.spec.vocab_size, submission.eos_ids)
            made._known_vocabulary()
            started = time.perf_counter()
            grammar = made.compile(wanted)
            compile_s = time.perf_counter() - started
            alone, many = grammar.start(), [grammar.start() for _ in range(32)]
            for token in tokens:
                started = time.perf_counter()
                advance([alone], [token])
                took.append(time.perf_counter() - started)
                started = time.perf_counter()
                advance(many, [token] * 32)
                together.append((time.perf_counter() - started) / 32)
            assert alone.failure is None
        print(
            f"{name:12} {compile_s * 1e3:7.1f} ms {len(tokens):7} {np.mean(took) * 1e6:8.0f} us "
            f"{np.quantile(took, 0.99) * 1e6:6.0f} us {np.mean(together) * 1e6:14.0f} us"
        )


def on_logits(vocab_size: int, repetitions: int) -> None:
    """Time to put masks on rows of logits, with one thread."""
    torch.set_num_threads(1)
    for n in (1, 16, 128):
        logits = torch.randn(n, vocab_size)
        bits = torch.randint(-(2**31), 2**31 - 1, (n, -(-vocab_size // 32)), dtype=torch.int32)
        rows, best = torch.arange(n), float("inf")
        for _ in range(repetitions * 5):
            started = time.perf_counter()
            keep_allowed(logits, rows, bits)
            best = min(best, time.perf_counter() - started)
        print(f"masks on {n:3} rows of logits: {best / n * 1e6:6.0f} us a row")


def decode_steps(llm: LLM, n_requests: int, n_tokens: int, repetitions: int) -> None:
    """How often the engine iterates, and time a token of the requests that are not guided (of all, where all are)."""
    free = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True)
    held = replace(free, structured=StructuredOutput(regex="[ -~]*"))
    prompts = [f"{i} things to see are" for i in range(n_requests)]
    kinds = {"none guided": 0, "one guided": 1, "all guided": n_requests}
    took_ms: dict[str, list[float]] = {name: [] for name in kinds}
    iterations: dict[str, int] = {}
    for _ in range(repetitions):
        for name, n_guided in kinds.items():
            before = llm.stats().work.iterations
            params = [held] * n_guided + [free] * (n_requests - n_guided)
            timed = llm.generate(prompts, params, use_tqdm=False)[n_guided % n_requests :]
            iterations[name] = llm.stats().work.iterations - before
            ended_s = max(output.metrics.finished_s or 0.0 for output in timed)
            took_ms[name].append((ended_s - timed[0].metrics.arrival_s) / n_tokens * 1e3)
    print(
        f"{n_requests} requests of {n_tokens} tokens; the requests that are not guided, or all: median (least to most)"
    )
    for name, times in took_ms.items():
        spread = f"{np.median(times):.0f} ms a token ({min(times):.0f} to {max(times):.0f})"
        print(f"{name}: {iterations[name]} iterations, {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    repetitions = 2 if parser.parse_args().quick else 5
    llm = LLM("smollm2", kv_memory_bytes=1 << 27, show_progress=False)
    masks(llm, repetitions)
    decode_steps(llm, 16, 64, repetitions)
    on_logits(llm.spec.vocab_size, repetitions)


if __name__ == "__main__":
    main()
