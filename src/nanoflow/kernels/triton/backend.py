"""The Triton backend: one method an operation, each a launch or two whose grids depend on shapes and the lane alone.

So a captured iteration replays for every batch of its size. Weights stay row-major; a fused gate-up weight has its rows
interleaved (`activation`), and the experts of a layer are stacked into one matrix (`experts`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.core import env
from nanoflow.kernels.base import AttentionPlan, AttentionWork, ExpertWeights, LinearWeight
from nanoflow.kernels.triton import activation, experts, gemm, launch, layout, linear, norm, work_lists
from nanoflow.kernels.triton.decode_attention import decode_attention
from nanoflow.kernels.triton.embed import embed
from nanoflow.kernels.triton.prefill_attention import prefill_attention
from nanoflow.kernels.triton.product_race import CardRace
from nanoflow.kernels.triton.products import ProductTable
from nanoflow.kernels.triton.rope import rope_append
from nanoflow.kernels.triton.sample import sample


@dataclass(frozen=True)
class StackedWeight:
    """A weight inside the stack (experts · n, k) of its layer."""

    stack: Tensor
    index: int


class TritonKernels:
    """Implements `kernels.base.Kernels` on NVIDIA GPUs, for bfloat16 and float16; float32 works, slowly."""

    name = "triton"
    capturable = True

    def __init__(self, products: str | None = None) -> None:
        """`products`: how a linear layer's product is chosen (`products.MODES`); the environment decides if left out.

        Raises `ConfigError` if it is unknown.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        race = CardRace(device.index or 0)
        self._table = ProductTable(name, race, launch.device_sms(device), products or env.products())
        # Sums in float32, rounded once, is what `linear` promises.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def settled(self) -> None:
        """See `kernels.base.Kernels.settled`: the races of products."""
        self._table.tell()

    def linear_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Keep the weight as it is (contiguous)."""
        return LinearWeight(weight_nk.shape[0], weight_nk.shape[1], weight_nk.dtype, weight_nk.detach().contiguous())

    def gate_up_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Interleave gate and up rows."""
        return self.linear_weight(gemm.interleaved(weight_nk.detach()))

    def expert_weights(self, weights: Iterable[Tensor], n_experts: int, *, gate_up: bool) -> tuple[LinearWeight, ...]:
        """Stack the weights, gate and up rows interleaved."""
        stack: Tensor | None = None
        taken = []
        for index, weight_nk in enumerate(weights):
            n, k = weight_nk.shape
            if stack is None:
                stack = weight_nk.new_empty(n_experts * n, k)
            stack[index * n : (index + 1) * n] = gemm.interleaved(weight_nk) if gate_up else weight_nk
            taken.append(LinearWeight(n, k, weight_nk.dtype, StackedWeight(stack, index)))
        assert len(taken) == n_experts
        return tuple(taken)

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
        if x_tk.shape[0]:
            linear.linear(self._table, x_tk, weight.data, out_tn, bias_n, accumulate)

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
        if x_tk.shape[0]:
            linear.linear_silu_mul(self._table, x_tk, weight.data, gate_up_tn, out_tf, bias_n)

    def embed(self, token_ids_t: Tensor, table: LinearWeight, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.embed`."""
        embed(token_ids_t, table.data, out_td)

    def rms_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.rms_norm`."""
        norm.rms_norm(x_td, weight_d, eps, out_td)

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
        rope_append(
            qkv_tn,
            positions_t,
            kv_slots_t,
            cos_sin,
            kv_layer,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            q_norm_e=q_norm_e,
            k_norm_e=k_norm_e,
            eps=eps,
        )

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
        """See `kernels.base.Kernels.attention`. A plan without a work list gets one made from its tensors (a sync)."""
        if plan.work is None:
            plan = self._planned(plan, n_heads, n_kv_heads, head_dim)
        attend = decode_attention if isinstance(plan.work, work_lists.DecodeWork) else prefill_attention
        attend(
            qkv_tn,
            kv_layer,
            plan.work,
            plan.page_table,
            out_tn,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            scale=scale,
            window=window,
        )

    def _planned(self, plan: AttentionPlan, n_heads: int, n_kv_heads: int, head_dim: int) -> AttentionPlan:
        device = plan.query_len.device
        query_start, query_len, context_len = (
            values.cpu().numpy() for values in (plan.query_start, plan.query_len, plan.context_len)
        )
        planner = self.attention_work(
            prefill=plan.max_query > 1,
            n_rows=int(query_len.sum()),
            n_requests=plan.n_requests,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            lane_sms=launch.lane_sms(device),
        )
        pages = plan.page_table.contiguous()
        page_start = (torch.arange(plan.n_requests, dtype=torch.int32) * pages.shape[1]).numpy()
        ints = torch.empty(planner.n_ints, dtype=torch.int32)
        planner.plan(query_start, query_len, context_len, page_start, ints.numpy())
        return replace(plan, page_table=pages, work=planner.bind(ints.to(device)))

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
    ) -> AttentionWork:
        """See `kernels.base.Kernels.attention_work`."""
        return work_lists.attention_work(
            prefill=prefill,
            n_rows=n_rows,
            n_requests=n_requests,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            lane_sms=lane_sms,
        )

    def silu_mul(self, gate_up_tn: Tensor, out_tf: Tensor) -> None:
        """See `kernels.base.Kernels.silu_mul`."""
        activation.silu_mul(gate_up_tn, out_tf)

    def experts(self, x_td: Tensor, weights: ExpertWeights, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.experts`; the weights come from `expert_weights`."""
        if x_td.shape[0] == 0:
            return
        logits_tx = torch.empty(x_td.shape[0], weights.router.n, dtype=torch.float32, device=x_td.device)
        self.linear(x_td, weights.router, logits_tx)
        experts.experts(
            x_td,
            logits_tx,
            weights.gate_up[0].data.stack,
            weights.down[0].data.stack,
            out_td,
            n_active=weights.n_active,
            normalise=weights.normalise,
            first=weights.first,
        )

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
        sample(logits_sv, temperature_s, top_k_s, top_p_s, min_p_s, keys_s, out_s)

    def allocate_kv(
        self, n_pages: int, page_tokens: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, n_layers: int
    ) -> list[Tensor]:
        """Zeroed pages on torch's default device (use `torch.device(...)` as a context to choose another)."""
        shape = layout.kv_shape(n_pages, page_tokens, n_kv_heads, head_dim)
        return [torch.zeros(shape, dtype=dtype) for _ in range(n_layers)]
