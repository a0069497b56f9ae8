"""Sampling in plain torch, all rows at once: sort, keep a prefix by top-k, top-p and min-p, then Gumbel-max.

Tokens whose score equals that of the last kept one are kept too, so the order of ties in a sort does not matter.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nanoflow.kernels import noise


def sample(
    logits_sv: Tensor,
    temperature_s: Tensor,
    top_k_s: Tensor,
    top_p_s: Tensor,
    min_p_s: Tensor,
    keys_s: Tensor,
    out_s: Tensor,
) -> None:
    """See `kernels.base.Kernels.sample`."""
    if logits_sv.shape[0] == 0:
        return
    logits = logits_sv.float()
    greedy = temperature_s <= 0.0
    best = logits.argmax(dim=-1)
    if bool(greedy.all()):
        out_s.copy_(best)
        return
    top = logits.amax(dim=-1, keepdim=True)
    scores = (logits - top) / torch.where(greedy, 1.0, temperature_s)[:, None]
    if bool(((top_k_s > 0) | (top_p_s < 1.0)).any()):
        scores = scores.masked_fill(scores < _sorted_threshold(scores, top_k_s, top_p_s), float("-inf"))
    scores = scores.masked_fill(scores < torch.log(min_p_s)[:, None], float("-inf"))
    chosen = (scores + noise.gumbel(keys_s, logits.shape[1])).argmax(dim=-1)
    out_s.copy_(torch.where(greedy, best, chosen))


def keep_allowed(logits_sv: Tensor, rows_m: Tensor, bits_mw: Tensor) -> None:
    """Set the logits of `rows_m` to minus infinity where the mask's bit is 0 (`core.batch.MaskPlan`). Any device."""
    n_vocab = logits_sv.shape[1]
    bytes_n = bits_mw.view(torch.uint8).flatten().int()
    forbidden_mv = _zero_bits(bits_mw.device).index_select(0, bytes_n).view(torch.bool).view(len(bits_mw), -1)
    forbidden_mv = forbidden_mv[:, :n_vocab]
    if len(rows_m) == len(logits_sv):
        logits_sv.masked_fill_(forbidden_mv, float("-inf"))
    else:
        logits_sv[rows_m] = logits_sv[rows_m].masked_fill(forbidden_mv, float("-inf"))


@cache
def _zero_bits(device: torch.device) -> Tensor:
    """Entry b: which of the eight bits of byte b are 0, lowest first, as eight bools in one number."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 0).view(torch.int64)[:, 0].to(device)


def _sorted_threshold(scores_sv: Tensor, top_k_s: Tensor, top_p_s: Tensor) -> Tensor:
    """Lowest score (S, 1) that survives top-k (0: no limit) and then top-p of what top-k kept."""
    ordered = scores_sv.sort(dim=-1, descending=True).values
    n_vocab = ordered.shape[1]
    limit = torch.where(top_k_s > 0, top_k_s, n_vocab).clamp(max=n_vocab).long()[:, None]
    kth = ordered.gather(1, limit - 1)
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    probs = torch.softmax(ordered.double(), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    n_kept = (before < top_p_s.double()[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus = ordered.gather(1, n_kept - 1)
    return torch.where(top_p_s[:, None] < 1.0, torch.maximum(kth, nucleus), kth)
