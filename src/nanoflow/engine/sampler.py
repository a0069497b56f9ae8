"""From logits to tokens on the device: penalties, logit changes, masks, the choice itself, and log-probabilities.

The common case (no penalties, biases, masks or log-probabilities) is one kernel call. Penalties need the tokens so far,
which the host does not know while a batch is in flight, so their counts live on the device, a row a request that has
any; sampling updates them in launch order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import LogprobArrays, PenaltyPlan, SamplingPlan
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.reference_sampling import keep_allowed


class PenaltyTable:
    """Per row: which tokens the prompt holds (bool, V) and how often each was generated (int32, V)."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def reset(self, plan: PenaltyPlan) -> None:
        """Fill the rows of newly admitted requests from their tokens so far, growing the table if need be."""
        if not plan.resets:
            return
        self._grow(1 + max(reset.row for reset in plan.resets))
        for reset in plan.resets:
            self._in_prompt[reset.row].zero_()
            self._in_prompt[reset.row, torch.from_numpy(reset.prompt_ids).long()] = True
            counts = np.bincount(reset.output_ids, minlength=self._counts.shape[1])
            self._counts[reset.row] = torch.from_numpy(counts.astype(np.int32)).to(self._counts.device)

    def _grow(self, n_rows: int) -> None:
        missing = n_rows - len(self._counts)
        if missing > 0:
            missing = max(missing, len(self._counts))
            self._counts = torch.cat([self._counts, self._counts.new_zeros(missing, self._counts.shape[1])])
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(missing, self._in_prompt.shape[1])])

    def apply(self, logits_sv: Tensor, plan: PenaltyPlan) -> None:
        """Change the logits of the rows that have penalties (definitions: OpenAI API; repetition: arXiv 1909.05858)."""
        picked = np.flatnonzero(plan.table_row >= 0)
        rows = torch.from_numpy(picked).to(logits_sv.device)
        table_rows = torch.from_numpy(plan.table_row[picked]).long().to(logits_sv.device)

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[picked]).to(logits_sv.device)[:, None]

        logits = logits_sv[rows]
        counts = self._counts[table_rows]
        repetition = torch.where((counts > 0) | self._in_prompt[table_rows], column(plan.repetition), 1.0)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits -= column(plan.frequency) * counts + column(plan.presence) * (counts > 0)
        logits_sv[rows] = logits

    def count(self, tokens_s: Tensor, plan: PenaltyPlan) -> None:
        """Add the sampled tokens."""
        picked = np.flatnonzero(plan.table_row >= 0)
        table_rows = torch.from_numpy(plan.table_row[picked]).long().to(tokens_s.device)
        tokens = tokens_s[torch.from_numpy(picked).to(tokens_s.device)].long()
        self._counts.index_put_((table_rows, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)


class LogitsSampler:
    """Implements `executor.Sampler` over a kernel backend."""

    def __init__(self, kernels: Kernels, vocab_size: int, device: torch.device) -> None:
        self._kernels = kernels
        self._device = device
        self._penalties = PenaltyTable(vocab_size, device)

    def begin(self, plan: SamplingPlan) -> None:
        """Load the penalty rows that this iteration brings."""
        if plan.penalties is not None:
            self._penalties.reset(plan.penalties)

    def sample(self, logits_sv: Tensor, plan: SamplingPlan, tokens_s: Tensor) -> LogprobArrays | None:
        """Write a token a row into `tokens_s` (int32). `logits_sv` is changed."""
        logprobs_sv = logits_sv.log_softmax(dim=-1) if plan.any_logprobs else None
        if plan.penalties is not None:
            self._penalties.apply(logits_sv, plan.penalties)
        if len(plan.bias_rows):
            rows, tokens = self._tensor(plan.bias_rows).long(), self._tensor(plan.bias_tokens).long()
            logits_sv.index_put_((rows, tokens), self._tensor(plan.bias_values), accumulate=True)
        if plan.masks is not None:
            keep_allowed(logits_sv, self._tensor(plan.masks.rows).long(), self._tensor(plan.masks.bits))
        self._kernels.sample(
            logits_sv,
            self._tensor(plan.temperature),
            self._tensor(plan.top_k),
            self._tensor(plan.top_p),
            self._tensor(plan.min_p),
            self._tensor(plan.keys),
            tokens_s,
        )
        if plan.penalties is not None:
            self._penalties.count(tokens_s, plan.penalties)
        if logprobs_sv is None:
            return None
        return _logprob_arrays(logprobs_sv, tokens_s, int(plan.n_logprobs.max()))

    def score(self, logits_lv: Tensor, target_ids: Tensor, n_top: int) -> LogprobArrays:
        """Log-probabilities of `target_ids` (L) under `logits_lv`, with `n_top` alternatives."""
        return _logprob_arrays(logits_lv.log_softmax(dim=-1), target_ids, n_top)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _logprob_arrays(logprobs_nv: Tensor, chosen_n: Tensor, n_top: int) -> LogprobArrays:
    chosen = logprobs_nv.gather(1, chosen_n.long()[:, None])
    rank = (logprobs_nv > chosen).sum(dim=1) + 1
    top = logprobs_nv.topk(max(0, n_top), dim=1)
    return LogprobArrays(
        chosen=chosen[:, 0].cpu().numpy(),
        rank=rank.to(torch.int32).cpu().numpy(),
        top_ids=top.indices.to(torch.int32).cpu().numpy(),
        top_logprobs=top.values.cpu().numpy(),
    )
