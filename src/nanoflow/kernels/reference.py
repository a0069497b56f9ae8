"""Every kernel in plain torch, on any device: the oracle that tests compare against and the fallback that always works.

Weights stay row-major; a KV page is (2, kv_heads, page_tokens, head_dim). Sums that the interface promises in
float32 are made there, if need be by widening a block of the weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.kernels import reference_attention, reference_sampling
from nanoflow.kernels.base import AttentionPlan, ExpertWeights, LinearWeight
from nanoflow.kernels.memory import lazy_zeros

_WIDEN_ELEMENTS = 1 << 22
"""Weight elements widened to float32 at a time: 16 MiB."""


def _rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def _rotated(x_the: Tensor, cos_t1e: Tensor, sin_t1e: Tensor) -> Tensor:
    first, second = x_the.chunk(2, dim=-1)
    return torch.cat((first * cos_t1e - second * sin_t1e, second * cos_t1e + first * sin_t1e), dim=-1)


class ReferenceKernels:
    """Implements `kernels.base.Kernels` without any compiled code of our own."""

    name = "reference"
    capturable = False

    def settled(self) -> None:
        """Nothing is chosen by measurement here."""

    def linear_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Keep the weight as it is (contiguous)."""
        return LinearWeight(weight_nk.shape[0], weight_nk.shape[1], weight_nk.dtype, weight_nk.detach().contiguous())

    def gate_up_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Keep the weight as it is (contiguous)."""
        return self.linear_weight(weight_nk)

    def expert_weights(self, weights: Iterable[Tensor], n_experts: int, *, gate_up: bool) -> tuple[LinearWeight, ...]:
        """Keep the weights as they are (contiguous)."""
        return tuple(self.linear_weight(weight) for weight in weights)

    def linear(
        self,
        x_tk: Tensor,
        weight: LinearWeight,
        out_tn: Tensor,
        *,
        bias_n: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """See `kernels.base.Kernels.linear`."""
        if x_tk.shape[0] == 0:
            return
        if x_tk.dtype == torch.float32 or (not accumulate and out_tn.dtype == x_tk.dtype):
            result = F.linear(x_tk, weight.data, bias_n)
            out_tn.copy_(out_tn + result if accumulate else result)
            return
        x_wide = x_tk.float()
        step = max(1, _WIDEN_ELEMENTS // weight.k)
        for first in range(0, weight.n, step):
            columns = slice(first, min(first + step, weight.n))
            result = x_wide @ weight.data[columns].float().t()
            if bias_n is not None:
                result += bias_n[columns].float()
            if accumulate:
                result += out_tn[:, columns].float()
            out_tn[:, columns] = result.to(out_tn.dtype)

    def linear_silu_mul(
        self,
        x_tk: Tensor,
        weight: LinearWeight,
        gate_up_tn: Tensor,
        out_tf: Tensor,
        *,
        bias_n: Tensor | None = None,
    ) -> None:
        """See `kernels.base.Kernels.linear_silu_mul`."""
        self.linear(x_tk, weight, gate_up_tn, bias_n=bias_n)
        self.silu_mul(gate_up_tn, out_tf)

    def embed(self, token_ids_t: Tensor, table: LinearWeight, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.embed`."""
        out_td.copy_(table.data[token_ids_t.long()])

    def rms_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.rms_norm`."""
        out_td.copy_(_rms_normed(x_td, weight_d, eps))

    def rope_append(
        self,
        qkv_tn: Tensor,
        positions_t: Tensor,
        kv_slots_t: Tensor,
        cos_sin: Tensor,
        kv_layer: Tensor,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        q_norm_e: Tensor | None = None,
        k_norm_e: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """See `kernels.base.Kernels.rope_append`."""
        q, k, v = (
            part.unflatten(1, (-1, head_dim))
            for part in qkv_tn.split([n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim], dim=1)
        )
        cos, sin = cos_sin[positions_t.long()][:, None, :].chunk(2, dim=-1)
        q_wide = q.float() if q_norm_e is None else _rms_normed(q, q_norm_e, eps)
        k_wide = k.float() if k_norm_e is None else _rms_normed(k, k_norm_e, eps)
        q.copy_(_rotated(q_wide, cos, sin))
        page_tokens = kv_layer.shape[3]
        real = kv_slots_t >= 0
        slots = kv_slots_t[real].long()
        pages, offsets = slots // page_tokens, slots % page_tokens
        kv_layer[pages, 0, :, offsets] = _rotated(k_wide, cos, sin)[real].to(kv_layer.dtype)
        kv_layer[pages, 1, :, offsets] = v[real].to(kv_layer.dtype)

    def attention(
        self,
        qkv_tn: Tensor,
        kv_layer: Tensor,
        plan: AttentionPlan,
        out_tn: Tensor,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None = None,
    ) -> None:
        """See `kernels.base.Kernels.attention`."""
        q = qkv_tn[:, : n_heads * head_dim].unflatten(1, (n_heads, head_dim))
        out = out_tn[:, : n_heads * head_dim].unflatten(1, (n_heads, head_dim))
        reference_attention.paged_attention(q, kv_layer, plan, out, scale=scale, window=window)

    def attention_work(
        self,
        *,
        prefill: bool,
        n_rows: int,
        n_requests: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        lane_sms: int,
    ) -> None:
        """None: these kernels read the plain plan."""
        return None

    def silu_mul(self, gate_up_tn: Tensor, out_tf: Tensor) -> None:
        """See `kernels.base.Kernels.silu_mul`."""
        gate, up = gate_up_tn.float().chunk(2, dim=-1)
        out_tf.copy_(F.silu(gate) * up)

    def experts(self, x_td: Tensor, weights: ExpertWeights, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.experts`. Tokens are grouped by expert; experts are summed in ascending order."""
        n_tokens, device = x_td.shape[0], x_td.device
        if n_tokens == 0:
            return
        logits = torch.empty(n_tokens, weights.router.n, dtype=torch.float32, device=device)
        self.linear(x_td, weights.router, logits)
        scores, chosen = torch.softmax(logits, dim=-1).topk(weights.n_active, dim=-1)
        if weights.normalise:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        total = out_td.float()
        held = range(weights.first, weights.first + len(weights.gate_up))
        for expert in chosen.unique().tolist():
            if expert not in held:
                continue
            tokens, rank = torch.where(chosen == expert)
            gate_up_weight, down_weight = weights.gate_up[expert - held.start], weights.down[expert - held.start]
            gate_up = x_td.new_empty(len(tokens), gate_up_weight.n)
            self.linear(x_td[tokens], gate_up_weight, gate_up)
            activated = x_td.new_empty(len(tokens), gate_up_weight.n // 2)
            self.silu_mul(gate_up, activated)
            result = x_td.new_empty(len(tokens), down_weight.n, dtype=torch.float32)
            self.linear(activated, down_weight, result)
            total.index_add_(0, tokens, result * scores[tokens, rank, None])
        out_td.copy_(total)

    def sample(
        self,
        logits_sv: Tensor,
        temperature_s: Tensor,
        top_k_s: Tensor,
        top_p_s: Tensor,
        min_p_s: Tensor,
        keys_s: Tensor,
        out_s: Tensor,
    ) -> None:
        """See `kernels.base.Kernels.sample`."""
        reference_sampling.sample(logits_sv, temperature_s, top_k_s, top_p_s, min_p_s, keys_s, out_s)

    def allocate_kv(
        self, n_pages: int, page_tokens: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, n_layers: int
    ) -> list[Tensor]:
        """Zeroed pages on torch's default device (use `torch.device(...)` as a context to choose another)."""
        shape = (n_pages, 2, n_kv_heads, page_tokens, head_dim)
        on_cpu = torch.get_default_device().type == "cpu"
        return [lazy_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype) for _ in range(n_layers)]
