"""Choosing tokens where each rank has the logits of its part of the vocabulary only.

Gumbel-max is a maximum, so each rank finds the best token of its part and the ranks compare their winners: two numbers
a row on the wire instead of the vocabulary. The noise of a token depends on its id in the whole vocabulary; since the
hash begins with id · constant + key, a rank gets the same noise from its own numbering by a shifted key.

Legend: s sampling rows, v tokens of this rank's part, n ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow.distributed.collectives import Collectives
from nanoflow.distributed.sharding import Span
from nanoflow.kernels import noise
from nanoflow.kernels.base import Kernels


def choose(
    logits_sv: Tensor,
    temperature_s: Tensor,
    keys_s: Tensor,
    out_s: Tensor,
    *,
    part: Span,
    ranks: int,
    kernels: Kernels,
    collectives: Collectives,
) -> None:
    """A token (int32, in the whole vocabulary) a row: argmax at temperature 0, else Gumbel-max over all tokens.

    `logits_sv` is this rank's `part` of the vocabulary. All ranks get the same tokens; of equal scores the lowest wins.
    """
    n_rows = len(out_s)
    if n_rows == 0:
        return
    keys_s = noise.shifted(keys_s, part.start)
    kept = torch.ones_like(temperature_s)
    everything = torch.zeros_like(out_s)
    kernels.sample(logits_sv, temperature_s, everything, kept, torch.zeros_like(kept), keys_s, out_s)
    best_s = logits_sv.gather(1, out_s.long()[:, None])[:, 0].float()
    noisy_s = best_s / torch.where(temperature_s > 0, temperature_s, 1.0) + noise.gumbel_of(keys_s, out_s)
    mine_s2 = torch.empty(n_rows, 2, dtype=torch.float32, device=out_s.device)
    mine_s2[:, 0] = torch.where(temperature_s > 0, noisy_s, best_s)
    mine_s2[:, 1] = (out_s + part.start).view(torch.float32)  # the bits of an integer: they are only carried
    all_ns2 = mine_s2.new_empty(ranks, n_rows, 2)
    collectives.all_gather(mine_s2, all_ns2)
    winner_1s = all_ns2[:, :, 0].argmax(dim=0, keepdim=True)
    out_s.copy_(all_ns2[:, :, 1].contiguous().view(torch.int32).gather(0, winner_1s)[0])
