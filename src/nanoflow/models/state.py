"""The explicit state of a nano-batch: slices of the dense batch's buffers plus what the batch plan says about them.

There is no "current batch" anywhere: several nano-batches are in flight at once, each with its own `NanoBatch`.
Buffers are allocated once for the dense batch; nano-batches of one iteration own disjoint rows of them.

Legend: t tokens, d model width, q query width, f feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoflow.core.model_spec import ModelSpec
from nanoflow.kernels.base import AttentionPlan


@dataclass(frozen=True)
class Activations:
    """Rows of the dense batch's buffers. `x` is the residual stream, `h` a normed copy of it.

    The residual stream sums one term a sublayer, so rounding it to bfloat16 each time would be the largest error of a
    forward pass; devices that can afford it keep it in float32.
    """

    x_td: Tensor
    h_td: Tensor
    qkv_tn: Tensor
    attn_tq: Tensor
    gate_up_tn: Tensor
    act_tf: Tensor
    attn_all_tq: Tensor | None = None  # the next three only where ranks gather around the O projection
    column_tn: Tensor | None = None
    gathered_t: Tensor | None = None

    def buffers(self) -> list[Tensor]:
        """All buffers there are."""
        return [buffer for buffer in vars(self).values() if buffer is not None]

    @staticmethod
    def allocate(
        spec: ModelSpec,
        n_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        residual_dtype: torch.dtype | None = None,
    ) -> Activations:
        """Buffers for `n_tokens` rows, the residual stream in `residual_dtype` (or `dtype`); contents undefined."""

        def buffer(width: int) -> Tensor:
            return torch.empty(n_tokens, width, dtype=dtype, device=device)

        return Activations(
            x_td=torch.empty(n_tokens, spec.d_model, dtype=residual_dtype or dtype, device=device),
            h_td=buffer(spec.d_model),
            qkv_tn=buffer(spec.d_qkv),
            attn_tq=buffer(spec.d_q),
            gate_up_tn=buffer(2 * spec.d_ff),
            act_tf=buffer(spec.d_ff),
        )

    def rows(self, start: int, stop: int) -> Activations:
        """The same buffers, rows [start, stop) only (views)."""
        cut: dict[str, Any] = {
            name: None if buffer is None else buffer[start:stop] for name, buffer in vars(self).items()
        }
        return Activations(**cut)


@dataclass(frozen=True)
class NanoBatch:
    """Everything an op needs to know of the tokens it works on; rows count from the slice's first token.

    `decode` and `prefill` are None where the slice holds no such tokens.
    """

    start: int
    n_tokens: int
    acts: Activations
    token_ids_t: Tensor
    positions_t: Tensor
    kv_slots_t: Tensor
    decode: AttentionPlan | None
    prefill: AttentionPlan | None
