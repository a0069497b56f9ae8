"""Batches of a steady state that nobody asked for: the right numbers of decode and prefill tokens, real page tables.

Profiles and verification need the batch that serving a workload would hold on average, without serving it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from nanoflow.analysis.lengths import find_workload
from nanoflow.core.batch import BatchPlan, Int32Array, SamplingPlan
from nanoflow.core.errors import ConfigError

SAMPLES = 10_000
TEMPERATURE = 1.0


@dataclass(frozen=True)
class SteadyMix:
    """The average iteration of a workload: `n_decode` tokens that see `context` keys each, the rest prompt chunks.

    Chunks have `chunk` tokens (the last one fewer) and `before` tokens of their prompt in the cache already.
    """

    workload: str
    dense_batch: int
    n_decode: int
    context: int
    chunk: int
    before: int

    @property
    def n_prefill(self) -> int:
        return self.dense_batch - self.n_decode

    def chunks(self, n_tokens: int) -> list[tuple[int, int]]:
        """(tokens, tokens before) of the chunks that make up `n_tokens` prompt tokens."""
        whole, rest = divmod(n_tokens, self.chunk)
        return [(self.chunk, self.before)] * whole + ([(rest, self.before)] if rest else [])

    def of_size(self, dense_batch: int) -> SteadyMix:
        """The same mix in batches of so many tokens."""
        n_decode = max(1, round(self.n_decode * dense_batch / self.dense_batch))
        return replace(self, dense_batch=dense_batch, n_decode=n_decode)

    def plan(self, n_pages: int, page_tokens: int) -> BatchPlan:
        """The whole dense batch as a plan over `n_pages` pages."""
        return make_plan(self.n_decode, self.context, self.chunks(self.n_prefill), n_pages, page_tokens)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def steady_mix(workload: str, dense_batch: int, max_running: int, max_context: int) -> SteadyMix:
    """The mix of `workload` (see `analysis.lengths`): a decode token sees its prompt and on average half its answer.

    At most `max_running` requests decode, and no request sees more than `max_context` tokens. Raises `ConfigError` for
    an unknown workload.
    """
    if dense_batch < 2:
        raise ConfigError(f"the dense batch must hold at least 2 tokens to overlap anything, not {dense_batch}.")
    prompts, answers = find_workload(workload).sample(SAMPLES)
    p, d = prompts.astype(np.float64), answers.astype(np.float64)
    context = float((p * d + d * (d + 1) / 2).sum() / d.sum())
    wanted = round(dense_batch / (1.0 + p.mean() / d.mean()))
    n_decode = min(max(1, wanted), max_running, dense_batch - 1)
    chunk = min(dense_batch - n_decode, max(1, round(p.mean())), max_context)
    before = max(0, round((p.mean() - chunk) / 2))
    return SteadyMix(
        workload, dense_batch, n_decode, min(round(context), max_context), chunk, min(before, max_context - chunk)
    )


def pages_for(n_decode: int, context: int, chunks: Sequence[tuple[int, int]], page_tokens: int) -> int:
    """Pages that these requests hold."""
    lengths = [context] * n_decode + [count + before for count, before in chunks]
    return sum(-(-length // page_tokens) for length in lengths)


def make_plan(
    n_decode: int,
    context: int,
    chunks: Sequence[tuple[int, int]],
    n_pages: int,
    page_tokens: int,
    seed: int = 0,
) -> BatchPlan:
    """`n_decode` requests of `context` keys and prompt chunks (tokens, tokens before), their pages strewn at random.

    With fewer pages than needed, requests share pages. Every decode token samples; no chunk ends its prompt.
    """
    query_len = np.array([1] * n_decode + [count for count, _ in chunks], dtype=np.int32)
    context_len = np.array([context] * n_decode + [sum(chunk) for chunk in chunks], dtype=np.int32)
    query_start = np.zeros(len(query_len) + 1, dtype=np.int32)
    np.cumsum(query_len, out=query_start[1:])
    n_tokens = int(query_start[-1])
    table = _page_table(context_len, n_pages, page_tokens, seed)
    owner = np.repeat(np.arange(len(query_len)), query_len)
    within = np.arange(n_tokens) - np.repeat(query_start[:-1], query_len)
    positions = (np.repeat(context_len - query_len, query_len) + within).astype(np.int32)
    kv_slots = table[owner, positions // page_tokens] * page_tokens + positions % page_tokens
    return BatchPlan(
        n_tokens=n_tokens,
        n_decode=n_decode,
        token_ids=np.zeros(n_tokens, dtype=np.int32),
        token_slots=owner.astype(np.int32),
        positions=positions,
        kv_slots=kv_slots.astype(np.int32),
        query_start=query_start,
        context_len=context_len,
        page_table=table,
        sampling=_sampling(n_decode),
    )


def _page_table(context_len: Int32Array, n_pages: int, page_tokens: int, seed: int) -> Int32Array:
    pages = -(-context_len // page_tokens)
    order = np.random.default_rng(seed).permutation(n_pages)
    table = np.zeros((len(context_len), int(pages.max())), dtype=np.int32)
    first = np.concatenate([[0], np.cumsum(pages)[:-1]])
    for row, (start, count) in enumerate(zip(first, pages, strict=True)):
        table[row, :count] = order[np.arange(start, start + count) % n_pages]
    return table


def _sampling(n_rows: int) -> SamplingPlan:
    rows = np.arange(n_rows, dtype=np.int32)
    none = np.empty(0, dtype=np.int32)
    return SamplingPlan(
        token_rows=rows,
        slots=rows,
        temperature=np.full(n_rows, TEMPERATURE, dtype=np.float32),
        top_k=np.zeros(n_rows, dtype=np.int32),
        top_p=np.ones(n_rows, dtype=np.float32),
        min_p=np.zeros(n_rows, dtype=np.float32),
        keys=np.arange(n_rows, dtype=np.int64),
        n_logprobs=np.full(n_rows, -1, dtype=np.int32),
        bias_rows=none,
        bias_tokens=none,
        bias_values=np.empty(0, dtype=np.float32),
    )
