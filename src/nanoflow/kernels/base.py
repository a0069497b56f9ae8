"""The kernel interface: one signature per operation, implemented by each backend (`reference`, `native`, `triton`).

plan / run: whatever depends on the batch arrives as tensors in an `AttentionPlan` or as the first dimension of a
slice; outputs go to buffers that the caller owns, so a steady iteration allocates nothing large. A backend may lay
out weights and KV pages as it likes: both are opaque to everyone else.

Legend of shape suffixes: t tokens, d model width, n output width, k input width, h query heads, g KV heads,
e head dim, f feed-forward width, r requests, p pages, s sampling rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array


@dataclass(frozen=True)
class LinearWeight:
    """A weight matrix of a linear layer, y = x Wᵀ: logical shape (n, k) and the backend's own storage of it."""

    n: int
    k: int
    dtype: torch.dtype
    data: Any

    @property
    def n_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertWeights:
    """Experts of one layer: per expert the fused gate-up (2f, d) and the down (d, f) projection; the router (x, d).

    The router knows all experts; held are those from number `first` on, and what others would add is left out.
    """

    router: LinearWeight
    gate_up: tuple[LinearWeight, ...]
    down: tuple[LinearWeight, ...]
    n_active: int
    normalise: bool
    first: int = 0


@dataclass(frozen=True)
class AttentionPlan:
    """Which query rows attend to which KV pages, for one nano-operation. All int32, on the device.

    Request r owns query rows `query_start[r] : query_start[r] + query_len[r]` of the slice it is used with; its last
    row sees `context_len[r]` keys, the row before one less, and so on (causal). `page_table[r]` lists its pages.
    `max_context` and `max_query` are upper bounds known on the host.

    `work` is what the backend's own planner made of it (see `AttentionWork`); a backend that plans reads that and
    `page_table`, then flat, and nothing else, so that one captured launch serves every batch.
    """

    query_start: Tensor
    query_len: Tensor
    context_len: Tensor
    page_table: Tensor
    n_requests: int
    max_query: int
    max_context: int
    work: Any = None


class AttentionWork(Protocol):
    """A backend's planner for one attention nano-operation: what to write each iteration and how a launch reads it."""

    n_ints: int
    """Length of the int32 array that `plan` fills."""

    def plan(
        self,
        query_start: Int32Array,
        query_len: Int32Array,
        context_len: Int32Array,
        page_start: Int32Array,
        out: Int32Array,
    ) -> None:
        """Write the work list of R requests (R = 0 allowed) into `out` (n_ints,).

        The first three are as in `AttentionPlan`; request r's pages begin at `page_table[page_start[r]]`.
        """
        ...

    def bind(self, ints: Tensor) -> Any:
        """The value for `AttentionPlan.work`: launches read `ints` (n_ints, on the device), whatever it holds then."""
        ...


class Kernels(Protocol):
    """What a backend offers. Every `out` is written, never read, unless the name of an argument says `accumulate`.

    The residual stream may be float32 beside weights of another type: it is `embed`'s and `experts`' `out`,
    `rms_norm`'s `x`, and `linear`'s `out`.
    """

    name: str
    capturable: bool
    """Whether launches read everything that changes between iterations from device memory (see `attention_work`)."""

    def settled(self) -> None:
        """An executor has met every shape it will launch: say in the log what choosing by measurement has cost."""
        ...

    def linear_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Take over a row-major weight; may repack it. The argument must not be used afterwards."""
        ...

    def gate_up_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Take over a fused gate-up weight (2f, d), gate rows first; for `linear_silu_mul` alone."""
        ...

    def expert_weights(self, weights: Iterable[Tensor], n_experts: int, *, gate_up: bool) -> tuple[LinearWeight, ...]:
        """Take over one projection of every expert, one at a time; `gate_up` as in `gate_up_weight`. For `experts`."""
        ...

    def linear(
        self,
        x_tk: Tensor,
        weight: LinearWeight,
        out_tn: Tensor,
        *,
        bias_n: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """out = x Wᵀ + bias, or out += … with `accumulate` (summed in float32, rounded once). `out` may be float32."""
        ...

    def linear_silu_mul(
        self,
        x_tk: Tensor,
        weight: LinearWeight,
        gate_up_tn: Tensor,
        out_tf: Tensor,
        *,
        bias_n: Tensor | None = None,
    ) -> None:
        """out = silu(gate) · up of x Wᵀ + bias, W from `gate_up_weight`; `gate_up` (t, 2f) is scratch.

        `bias_n` has the gate's part first, like the weight that was taken over.
        """
        ...

    def embed(self, token_ids_t: Tensor, table: LinearWeight, out_td: Tensor) -> None:
        """Row look-up in the (possibly packed, possibly tied) embedding table; ids are int32 in [0, n)."""
        ...

    def rms_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """out = x / sqrt(mean(x²) + eps) · weight, in float32 inside."""
        ...

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
        """QK-norm (if weights are given), rotate Q in place (half-split "NeoX" form), write rotated K, and V, to pages.

        `cos_sin` is float32 (positions, e): the first half cosines, the second sines. `kv_slots_t` is page ·
        page_tokens + offset; a row whose slot is negative is padding: nothing of it need be written.
        """
        ...

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
        """Causal paged attention of the plan's query rows: Q is the first h·e columns of `qkv`; writes h·e columns.

        `window` w: a query at position i sees keys in (i - w, i]. Used for decode (one row a request) and for prefill.
        Rows that no request owns are left alone.
        """
        ...

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
    ) -> AttentionWork | None:
        """The planner for an attention launch of at most `n_rows` query rows of `n_requests` requests on a lane of
        `lane_sms` multiprocessors; None for a backend that reads the plain `AttentionPlan`."""
        ...

    def silu_mul(self, gate_up_tn: Tensor, out_tf: Tensor) -> None:
        """out = silu(gate) · up, with gate the first f columns and up the last f."""
        ...

    def experts(self, x_td: Tensor, weights: ExpertWeights, out_td: Tensor) -> None:
        """out += Σ over the chosen experts of weight · expert(x): softmax router in float32, top `n_active`."""
        ...

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
        """Choose a token a row from its logits: argmax at temperature 0, else Gumbel-max over the kept tokens.

        Kept are the `top_k` (0: all) likeliest after temperature, of these the smallest set whose probability reaches
        `top_p`, of these those with at least `min_p` times the largest probability. Noise: `kernels.noise`.
        Logits are float32, and on a GPU also bfloat16 or float16; they are read, not changed.
        """
        ...

    def allocate_kv(
        self, n_pages: int, page_tokens: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, n_layers: int
    ) -> list[Tensor]:
        """One tensor a layer with `n_pages` in its first dimension; the layout inside a page is the backend's own."""
        ...
