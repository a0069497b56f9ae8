"""LM head and sampling, launch by launch: any plan, with penalties, biases, masks and log-probabilities.

Rows go through in blocks, so float32 logits never take much memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import LogprobArrays, MaskPlan, PromptLogprobPlan, SamplingPlan
from nanoflow.models.decoder import Decoder
from nanoflow.models.sharded import ShardedDecoder

LOGIT_ROWS = 128
"""Rows of logits made at a time: enough for an efficient product, few enough to stay in a CPU's cache."""


class Sampler(Protocol):
    """Chooses tokens from logits; keeps what it needs between iterations by slot."""

    def begin(self, plan: SamplingPlan) -> None:
        """Prepare for a new iteration (e.g. load the penalty rows of newly admitted requests)."""
        ...

    def sample(self, logits_sv: Tensor, plan: SamplingPlan, tokens_s: Tensor) -> LogprobArrays | None:
        """Write a token a row; `logits_sv` (float32) may be changed. Log-probabilities if any row asks."""
        ...

    def score(self, logits_lv: Tensor, target_ids: Tensor, n_top: int) -> LogprobArrays:
        """Log-probabilities of given tokens under unchanged logits, with `n_top` alternatives."""
        ...


class BlockHead:
    """Samples and scores rows of the residual stream `x_td`; leaves sampled tokens in `last_tokens` by slot."""

    def __init__(self, decoder: Decoder, sampler: Sampler, x_td: Tensor, last_tokens: Tensor) -> None:
        self._decoder = decoder
        self.sampler = sampler
        self._x_td = x_td
        self._last_tokens = last_tokens
        self._sharded = decoder if isinstance(decoder, ShardedDecoder) else None
        self._logits = torch.empty(LOGIT_ROWS, decoder.spec.vocab_size, dtype=torch.float32, device=x_td.device)

    def sample(self, plan: SamplingPlan) -> tuple[Tensor, LogprobArrays | None]:
        """A token (int32) a row of the plan, and log-probabilities if any row asks."""
        n_rows = len(plan.token_rows)
        tokens = torch.empty(n_rows, dtype=torch.int32, device=self._last_tokens.device)
        self.sampler.begin(plan)
        parts: list[LogprobArrays | None] = []
        for start in range(0, n_rows, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, n_rows)
            part = plan if stop - start == n_rows else plan.rows(start, stop)
            if self._sharded is not None and keeps_every_token(part):
                self._choose(self._sharded, part, tokens[start:stop])
                parts.append(None)
                continue
            logits = self._logits_of(part.token_rows)
            parts.append(self.sampler.sample(logits, part, tokens[start:stop]))
        if n_rows:
            self._last_tokens.index_copy_(0, self._tensor(plan.slots).long(), tokens)
        return tokens, _joined(parts)

    def _choose(self, decoder: ShardedDecoder, plan: SamplingPlan, tokens_s: Tensor) -> None:
        """Let the ranks compare their best tokens instead of gathering logits."""
        logits = self._logits.view(-1)[: len(tokens_s) * len(decoder.shard.vocab)].view(len(tokens_s), -1)
        decoder.lm_head_part(self._x_td, self._tensor(plan.token_rows), logits)
        decoder.choose(logits, self._tensor(plan.temperature), self._tensor(plan.keys), tokens_s)

    def score(self, plan: PromptLogprobPlan) -> LogprobArrays | None:
        """Log-probabilities of the plan's prompt tokens."""
        n_top = int(plan.n_logprobs.max())

        def block(start: int) -> LogprobArrays:
            part = slice(start, start + LOGIT_ROWS)
            return self.sampler.score(
                self._logits_of(plan.token_rows[part]), self._tensor(plan.target_ids[part]), n_top
            )

        return _joined([block(start) for start in range(0, len(plan.token_rows), LOGIT_ROWS)])

    def _logits_of(self, token_rows: np.ndarray) -> Tensor:
        logits = self._logits[: len(token_rows)]
        self._decoder.lm_head(self._x_td, self._tensor(token_rows), logits)
        return logits

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._x_td.device)


def is_plain(plan: SamplingPlan) -> bool:
    """Whether tokens depend on the logits alone: no penalties, biases or masks, and no log-probabilities asked for."""
    return plan.penalties is None and not plan.any_logprobs and not len(plan.bias_rows) and plan.masks is None


def split_masked(plan: SamplingPlan) -> tuple[SamplingPlan, SamplingPlan, np.ndarray] | None:
    """The plan of the rows without a mask, that of the others, and the order that puts their tokens back in place.

    None unless there are both kinds of rows and masks are all that keeps the plan from being plain.
    """
    masks = plan.masks
    if masks is None or len(masks.rows) == len(plan.token_rows) or not is_plain(replace(plan, masks=None)):
        return None
    free = np.delete(np.arange(len(plan.token_rows), dtype=np.int32), masks.rows)

    def picked(rows: np.ndarray, masks: MaskPlan | None) -> SamplingPlan:
        columns = ("token_rows", "slots", "temperature", "top_k", "top_p", "min_p", "keys", "n_logprobs")
        return replace(plan, masks=masks, **{name: getattr(plan, name)[rows] for name in columns})

    masked = picked(masks.rows, MaskPlan(np.arange(len(masks.rows), dtype=np.int32), masks.bits))
    return picked(free, None), masked, np.argsort(np.concatenate([free, masks.rows]))


def keeps_every_token(plan: SamplingPlan) -> bool:
    """Whether `plan` is plain and no row that draws is limited by top-k, top-p or min-p."""
    limited = (plan.top_k > 0) | (plan.top_p < 1.0) | (plan.min_p > 0.0)
    return is_plain(plan) and not bool((limited & (plan.temperature > 0.0)).any())


def _joined(parts: Sequence[LogprobArrays | None]) -> LogprobArrays | None:
    """Row blocks put together (all of them score or none: the sampler decides by the whole plan)."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if len(parts) == 1:
        return known[0]
    width = max(part.top_ids.shape[1] for part in known)
    return LogprobArrays(
        chosen=np.concatenate([part.chosen for part in known]),
        rank=np.concatenate([part.rank for part in known]),
        top_ids=np.concatenate([_padded(part.top_ids, width) for part in known]),
        top_logprobs=np.concatenate([_padded(part.top_logprobs, width) for part in known]),
    )


def _padded(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))
