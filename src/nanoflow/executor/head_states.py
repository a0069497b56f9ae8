"""Fixed states for recordings of the LM head and sampling: a number of rows, at fixed addresses.

What changes between iterations (which rows sample, how, into which slot) is staged as integers; rows beyond a plan's
sample row 0 greedily into the spare slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import SamplingPlan
from nanoflow.executor.pinned import Layout

HEAD_STEP = 64

LIMITED_ROWS = 128
"""Rows a replay where ranks gather the logits of the whole vocabulary: more would take much memory."""


@dataclass
class HeadState:
    """Sampling of `n` rows: views of the staged plan, the logits' buffer, and where the tokens go.

    `parts`: each rank has the logits of its part of the vocabulary, and rows keep every token.
    """

    n: int
    parts: bool
    keys_s: Tensor
    token_rows_s: Tensor
    slots_s: Tensor
    top_k_s: Tensor
    temperature_s: Tensor
    top_p_s: Tensor
    min_p_s: Tensor
    logits_sv: Tensor
    tokens_s: Tensor


def head_states(
    n_rows: int, vocab: int, dtype: torch.dtype, staged: Tensor, capacity: int, *, parts: bool = False
) -> list[list[HeadState]]:
    """States (each the only one of its program's run) by rising number of rows, up to `n_rows`.

    `staged` is the device buffer of plans of up to `capacity` rows (`head_layout`). All share one buffer of logits.
    """
    sizes = [*(n for n in (1, 8, 32) if n < n_rows), *range(HEAD_STEP, n_rows, HEAD_STEP), n_rows]
    logits = torch.zeros(n_rows, vocab, dtype=dtype, device=staged.device)
    tokens = torch.zeros(n_rows, dtype=torch.int32, device=staged.device)
    pieces = [staged[piece] for piece in head_layout(capacity)]
    keys, (token_rows, slots, top_k) = pieces[0].view(torch.int64), pieces[1:4]
    temperature, top_p, min_p = (piece.view(torch.float32) for piece in pieces[4:])
    return [
        [
            HeadState(
                n,
                parts,
                keys_s=keys[:n],
                token_rows_s=token_rows[:n],
                slots_s=slots[:n],
                top_k_s=top_k[:n],
                temperature_s=temperature[:n],
                top_p_s=top_p[:n],
                min_p_s=min_p[:n],
                logits_sv=logits[:n],
                tokens_s=tokens[:n],
            )
        ]
        for n in sizes
    ]


def head_layout(n: int) -> list[slice]:
    """Keys (two ints each), token rows, slots, top_k, temperature, top_p, min_p."""
    layout = Layout()
    return [layout.take(2 * n, align=2), *(layout.take(n) for _ in range(6))]


def write_head(plan: SamplingPlan | None, host: np.ndarray, spare_slot: int, capacity: int) -> None:
    """Stage `plan`; rows beyond it sample row 0 greedily into the spare slot."""
    keys, token_rows, slots, top_k, temperature, top_p, min_p = (host[piece] for piece in head_layout(capacity))
    n = 0 if plan is None else len(plan.token_rows)
    token_rows[n:], slots[n:], top_k[n:], keys[2 * n :] = 0, spare_slot, 0, 0
    for array, fill in ((temperature, 0.0), (top_p, 1.0), (min_p, 0.0)):
        array[n:].view(np.float32)[:] = fill
    if plan is None:
        return
    keys[: 2 * n].view(np.int64)[:] = plan.keys
    token_rows[:n], slots[:n], top_k[:n] = plan.token_rows, plan.slots, plan.top_k
    for array, values in ((temperature, plan.temperature), (top_p, plan.top_p), (min_p, plan.min_p)):
        array[:n].view(np.float32)[:] = values
