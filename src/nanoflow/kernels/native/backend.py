"""The native backend: checks nothing it need not, takes addresses and strides of tensors, and calls the C++ kernels.

Nine calls a layer and token pass through here, so each method is a few attribute reads and one foreign call, which
releases the interpreter lock. Inputs may be row or column slices of larger buffers; the last dimension is contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow.kernels.base import AttentionPlan, ExpertWeights, LinearWeight
from nanoflow.kernels.memory import Arena, lazy_zeros
from nanoflow.kernels.native import bindings

_ACCUMULATE, _OUT_F32, _BIAS_F32 = 1, 2, 4
_LANES = 16


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernel's panel layout (see `src/gemm.h`) and its address."""

    storage: Tensor
    address: int


class NativeKernels:
    """Implements `kernels.base.Kernels` on CPUs for one element type, float32 or bfloat16."""

    name = "native"
    capturable = False

    def __init__(self, dtype: torch.dtype) -> None:
        """Raises `build.BuildError` if the kernels cannot be compiled here."""
        self._dtype = dtype
        self._c = bindings.functions(dtype)
        self._linear = self._c.linear
        self._arena = Arena()
        self._expert_tables: dict[
            int, tuple[ExpertWeights, ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]
        ] = {}

    def _is_wide(self, tensor: Tensor) -> bool:
        """Whether an activation is float32; the only other type the kernels take is the weights'."""
        if tensor.dtype is torch.float32:
            return True
        assert tensor.dtype is self._dtype
        return False

    def settled(self) -> None:
        """Nothing is chosen by measurement here."""

    def linear_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Repack into panels; the row-major original can be freed."""
        n, k = weight_nk.shape
        source = weight_nk.detach().to(self._dtype).contiguous()
        packed = self._arena.empty(self._c.packed_size(n, k), self._dtype)
        self._c.pack(source.data_ptr(), n, k, packed.data_ptr())
        return LinearWeight(n, k, self._dtype, PackedWeight(packed, packed.data_ptr()))

    def gate_up_weight(self, weight_nk: Tensor) -> LinearWeight:
        """Repack into panels, gate rows first."""
        return self.linear_weight(weight_nk)

    def expert_weights(self, weights: Iterable[Tensor], n_experts: int, *, gate_up: bool) -> tuple[LinearWeight, ...]:
        """Repack each into panels."""
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
        assert x_tk.dtype is self._dtype and x_tk.stride(-1) == 1 and out_tn.stride(-1) == 1
        flags = _ACCUMULATE if accumulate else 0
        if out_tn.dtype is torch.float32:
            flags |= _OUT_F32
        bias = None
        if bias_n is not None:
            bias = bias_n.data_ptr()
            if bias_n.dtype is torch.float32:
                flags |= _BIAS_F32
        self._linear(
            x_tk.data_ptr(),
            x_tk.stride(0),
            x_tk.size(0),
            weight.data.address,
            weight.n,
            weight.k,
            bias,
            out_tn.data_ptr(),
            out_tn.stride(0),
            flags,
        )

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
        assert token_ids_t.dtype is torch.int32 and token_ids_t.is_contiguous()
        self._c.embed(
            token_ids_t.data_ptr(),
            token_ids_t.size(0),
            table.data.address,
            table.n,
            table.k,
            out_td.data_ptr(),
            out_td.stride(0),
            self._is_wide(out_td),
        )

    def rms_norm(self, x_td: Tensor, weight_d: Tensor, eps: float, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.rms_norm`."""
        assert weight_d.dtype is self._dtype and out_td.dtype is self._dtype
        self._c.rms_norm(
            x_td.data_ptr(),
            x_td.stride(0),
            weight_d.data_ptr(),
            out_td.data_ptr(),
            out_td.stride(0),
            x_td.size(0),
            weight_d.size(0),
            eps,
            self._is_wide(x_td),
        )

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
        assert qkv_tn.dtype is self._dtype and cos_sin.dtype is torch.float32 and positions_t.dtype is torch.int32
        self._c.rope_append(
            qkv_tn.data_ptr(),
            qkv_tn.stride(0),
            qkv_tn.size(0),
            positions_t.data_ptr(),
            kv_slots_t.data_ptr(),
            cos_sin.data_ptr(),
            kv_layer.data_ptr(),
            kv_layer.size(3),
            n_heads,
            n_kv_heads,
            head_dim,
            None if q_norm_e is None else q_norm_e.data_ptr(),
            None if k_norm_e is None else k_norm_e.data_ptr(),
            eps,
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
        """See `kernels.base.Kernels.attention`."""
        assert qkv_tn.dtype is self._dtype and out_tn.dtype is self._dtype and plan.page_table.dtype is torch.int32
        page_table = plan.page_table
        self._c.attention(
            qkv_tn.data_ptr(),
            qkv_tn.stride(0),
            kv_layer.data_ptr(),
            kv_layer.size(3),
            plan.query_start.data_ptr(),
            plan.query_len.data_ptr(),
            plan.context_len.data_ptr(),
            page_table.data_ptr(),
            page_table.stride(0),
            plan.n_requests,
            out_tn.data_ptr(),
            out_tn.stride(0),
            n_heads,
            n_kv_heads,
            head_dim,
            scale,
            window or 0,
        )

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
        assert gate_up_tn.dtype is self._dtype and out_tf.dtype is self._dtype
        self._c.silu_mul(
            gate_up_tn.data_ptr(),
            gate_up_tn.stride(0),
            out_tf.data_ptr(),
            out_tf.stride(0),
            out_tf.size(0),
            gate_up_tn.size(1) // 2,
        )

    def experts(self, x_td: Tensor, weights: ExpertWeights, out_td: Tensor) -> None:
        """See `kernels.base.Kernels.experts`."""
        assert x_td.dtype is self._dtype
        known = self._expert_tables.get(id(weights))
        if known is None or known[0] is not weights:
            known = (weights, _addresses(weights.gate_up, weights), _addresses(weights.down, weights))
            self._expert_tables[id(weights)] = known
        _, gate_up, down = known
        self._c.experts(
            x_td.data_ptr(),
            x_td.stride(0),
            x_td.size(0),
            weights.router.k,
            weights.down[0].k,
            weights.router.data.address,
            weights.router.n,
            weights.n_active,
            int(weights.normalise),
            gate_up,
            down,
            out_td.data_ptr(),
            out_td.stride(0),
            self._is_wide(out_td),
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
        assert logits_sv.dtype is torch.float32 and keys_s.dtype is torch.int64 and out_s.dtype is torch.int32
        assert temperature_s.dtype is top_p_s.dtype is min_p_s.dtype is torch.float32 and top_k_s.dtype is torch.int32
        self._c.sample(
            logits_sv.data_ptr(),
            logits_sv.stride(0),
            logits_sv.size(0),
            logits_sv.size(1),
            temperature_s.data_ptr(),
            top_k_s.data_ptr(),
            top_p_s.data_ptr(),
            min_p_s.data_ptr(),
            keys_s.data_ptr(),
            out_s.data_ptr(),
        )

    def allocate_kv(
        self, n_pages: int, page_tokens: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, n_layers: int
    ) -> list[Tensor]:
        """Zeroed pages (n_pages, 2, n_kv_heads, page_tokens, head_dim rounded up to 16); see `src/attention.cpp`."""
        assert dtype is self._dtype and page_tokens % _LANES == 0
        padded = -(-head_dim // _LANES) * _LANES
        return [lazy_zeros((n_pages, 2, n_kv_heads, page_tokens, padded), dtype) for _ in range(n_layers)]


def _addresses(held: tuple[LinearWeight, ...], weights: ExpertWeights) -> ctypes.Array[ctypes.c_void_p]:
    """A pointer for every expert that the router knows; null for those that are not held."""
    absent_after = weights.router.n - weights.first - len(held)
    addresses = [*[None] * weights.first, *(weight.data.address for weight in held), *[None] * absent_after]
    return (ctypes.c_void_p * len(addresses))(*addresses)
