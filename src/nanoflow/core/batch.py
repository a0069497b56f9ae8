"""The plan of one iteration: everything that depends on the batch, as numpy arrays, and nothing else.

The scheduler writes a `BatchPlan`; the executor stages it and hands slices to the kernels. It holds no request
objects, so it can be broadcast to other ranks as it is.

Shapes: T tokens of the dense batch (decode tokens first, then prefill chunks), R requests in the same order, P the
widest page table, S sequences that sample a token this iteration, B single-logit changes, M of the S rows that may
choose among some tokens only, L prompt positions whose log-probability was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

LAST_SAMPLED = -1
"""Token id that stands for: the token sampled last for this request's slot, which only the device knows yet."""


@dataclass(frozen=True)
class PenaltyReset:
    """Fill penalty-table row `row` anew from a request's tokens so far (first sampling after admission)."""

    row: int
    prompt_ids: Int32Array
    output_ids: Int32Array


@dataclass(frozen=True)
class PenaltyPlan:
    """Penalties of the S sampling rows; `table_row` is -1 where a request has none."""

    table_row: Int32Array
    repetition: Float32Array
    presence: Float32Array
    frequency: Float32Array
    resets: tuple[PenaltyReset, ...] = ()


@dataclass(frozen=True)
class MaskPlan:
    """Which tokens `rows` (M, ascending) may choose: `bits` (M, W) has one bit a token, lowest first, W * 32 >= V."""

    rows: Int32Array
    bits: Int32Array


@dataclass(frozen=True)
class SamplingPlan:
    """How each of S sequences chooses its token.

    `keys` is the 64-bit random key of (request seed, number of tokens generated): equal keys and logits give equal
    tokens on every device. `n_logprobs` is -1 where none are wanted; `any_logprobs` tells whether any row wants some.
    `bias_*` add to single logits (`-inf` forbids); `masks` forbid all tokens but some.
    """

    token_rows: Int32Array
    slots: Int32Array
    temperature: Float32Array
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array
    keys: Int64Array
    n_logprobs: Int32Array
    bias_rows: Int32Array
    bias_tokens: Int32Array
    bias_values: Float32Array
    penalties: PenaltyPlan | None = None
    any_logprobs: bool = False
    masks: MaskPlan | None = None

    def rows(self, start: int, stop: int) -> SamplingPlan:
        """The plan of rows [start, stop) alone (penalty resets left out: they happen once for the whole plan)."""
        cut = slice(start, stop)
        biased = (self.bias_rows >= start) & (self.bias_rows < stop)
        penalties = self.penalties
        if penalties is not None:
            penalties = PenaltyPlan(
                penalties.table_row[cut], penalties.repetition[cut], penalties.presence[cut], penalties.frequency[cut]
            )
        masks = self.masks
        if masks is not None:
            first, last = np.searchsorted(masks.rows, (start, stop))
            masks = MaskPlan(masks.rows[first:last] - start, masks.bits[first:last]) if first < last else None
        return SamplingPlan(
            token_rows=self.token_rows[cut],
            slots=self.slots[cut],
            temperature=self.temperature[cut],
            top_k=self.top_k[cut],
            top_p=self.top_p[cut],
            min_p=self.min_p[cut],
            keys=self.keys[cut],
            n_logprobs=self.n_logprobs[cut],
            bias_rows=self.bias_rows[biased] - start,
            bias_tokens=self.bias_tokens[biased],
            bias_values=self.bias_values[biased],
            penalties=penalties,
            any_logprobs=self.any_logprobs,
            masks=masks,
        )


@dataclass(frozen=True)
class PromptLogprobPlan:
    """Prompt positions to score: hidden state of `token_rows[l]` predicts `target_ids[l]` (k alternatives each)."""

    token_rows: Int32Array
    target_ids: Int32Array
    n_logprobs: Int32Array


@dataclass(frozen=True)
class BatchPlan:
    """One iteration. The first `n_decode` tokens are one decode token a request; the rest are prefill chunks.

    `query_start` (R+1) delimits each request's tokens; `context_len` (R) counts its tokens in the KV cache once this
    batch is appended; `kv_slots` (T) is page * page_tokens + offset where each token's keys and values go.
    """

    n_tokens: int
    n_decode: int
    token_ids: Int32Array
    token_slots: Int32Array
    positions: Int32Array
    kv_slots: Int32Array
    query_start: Int32Array
    context_len: Int32Array
    page_table: Int32Array
    sampling: SamplingPlan
    prompt_logprobs: PromptLogprobPlan | None = None

    @property
    def n_requests(self) -> int:
        return len(self.context_len)


@dataclass(frozen=True)
class LogprobArrays:
    """Log-probabilities of N rows: of the chosen (or target) token with its rank, and the K likeliest tokens."""

    chosen: Float32Array
    rank: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array


@dataclass(frozen=True)
class BatchResult:
    """What an iteration gave: S sampled tokens (order of `SamplingPlan`) and the log-probabilities asked for.

    `logprobs` covers all S rows if any row wanted some; `prompt_logprobs` covers the L rows of `PromptLogprobPlan`.
    """

    tokens: Int32Array
    logprobs: LogprobArrays | None = None
    prompt_logprobs: LogprobArrays | None = None
