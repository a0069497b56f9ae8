"""Random paged requests for the attention kernels, planned, launched, and compared with the reference in float32.

Every request's pages are drawn from one shuffled pool; the output is poisoned, so that an unwritten or stray element
shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow.core.batch import Int32Array
from nanoflow.kernels.base import AttentionPlan
from nanoflow.kernels.reference import ReferenceKernels
from nanoflow.kernels.triton import layout
from nanoflow.kernels.triton.decode_attention import decode_attention
from nanoflow.kernels.triton.prefill_attention import prefill_attention
from nanoflow.kernels.triton.work_lists import DecodePlanner, PrefillPlanner

POISON = 7.0
EXTRA_PAGES = 3


@dataclass(frozen=True)
class Model:
    """The shape of an attention layer."""

    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    page_tokens: int = 16
    window: int | None = None


@dataclass
class Case:
    """Requests with `query_len[r]` new rows at the end of `context_len[r]` keys, and their random pages and rows."""

    model: Model
    query_start: Int32Array
    query_len: Int32Array
    context_len: Int32Array
    page_table: Tensor
    page_start: Int32Array
    qkv: Tensor
    kv: Tensor

    @staticmethod
    def random(
        model: Model, query_len: list[int], context_len: list[int], dtype: torch.dtype, device: str, gap: int = 0
    ) -> Case:
        """`gap` unowned rows stand between the requests' rows."""
        lengths, contexts = np.array(query_len, np.int32), np.array(context_len, np.int32)
        starts = (np.cumsum(lengths + gap) - lengths - gap).astype(np.int32)
        widest = max([-(-c // model.page_tokens) for c in context_len], default=0)
        n_pages = widest * len(context_len) + EXTRA_PAGES
        pages = torch.randperm(n_pages)[: n_pages - EXTRA_PAGES].int().reshape(len(context_len), widest)
        width = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
        rows = int((lengths + gap).sum()) + 1
        shape = layout.kv_shape(n_pages, model.page_tokens, model.n_kv_heads, model.head_dim)
        return Case(
            model,
            starts,
            lengths,
            contexts,
            pages.to(device),
            (np.arange(len(contexts)) * widest).astype(np.int32),
            torch.randn(rows, width, device=device).to(dtype),
            torch.randn(shape, device=device).to(dtype),
        )

    def ints(self, planner: DecodePlanner | PrefillPlanner) -> Tensor:
        """The planner's list for these requests, written over garbage."""
        out = np.full(planner.n_ints, -12345, np.int32)
        planner.plan(self.query_start, self.query_len, self.context_len, self.page_start, out)
        return torch.from_numpy(out).to(self.qkv.device)

    def expected(self) -> Tensor:
        """What the reference computes in float32."""
        plan = AttentionPlan(
            *(torch.from_numpy(a).to(self.qkv.device) for a in (self.query_start, self.query_len, self.context_len)),
            self.page_table,
            len(self.query_len),
            int(self.query_len.max(initial=0)),
            int(self.context_len.max(initial=0)),
        )
        out = self.blank(torch.float32)
        m = self.model
        ReferenceKernels().attention(
            self.qkv.float(),
            self.kv.float(),
            plan,
            out,
            n_heads=m.n_heads,
            n_kv_heads=m.n_kv_heads,
            head_dim=m.head_dim,
            scale=m.head_dim**-0.5,
            window=m.window,
        )
        return out

    def blank(self, dtype: torch.dtype) -> Tensor:
        """A poisoned output, a column slice of a wider buffer."""
        width = self.model.n_heads * self.model.head_dim
        return torch.full((self.qkv.shape[0], width + 8), POISON, dtype=dtype, device=self.qkv.device)[:, :width]

    def launch(self, planner: DecodePlanner | PrefillPlanner, ints: Tensor, out: Tensor) -> None:
        """Run the kernel that belongs to the planner."""
        m = self.model
        shape = {"n_heads": m.n_heads, "n_kv_heads": m.n_kv_heads, "head_dim": m.head_dim}
        scale = m.head_dim**-0.5
        table = self.page_table
        if isinstance(planner, DecodePlanner):
            decode_attention(self.qkv, self.kv, planner.bind(ints), table, out, **shape, scale=scale, window=m.window)
        else:
            prefill_attention(self.qkv, self.kv, planner.bind(ints), table, out, **shape, scale=scale, window=m.window)

    def check(self, planner: DecodePlanner | PrefillPlanner) -> None:
        """The kernel's rows equal the reference's up to the element type's rounding; all other rows are untouched."""
        out = self.blank(self.qkv.dtype)
        self.launch(planner, self.ints(planner), out)
        compare(out, self.expected())


def compare(actual: Tensor, expected: Tensor) -> None:
    """Both the largest and the mean error within a few units of the element type's rounding."""
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[actual.dtype]
    assert torch.equal(actual == POISON, expected == POISON)
    difference = (actual.double() - expected.double()).abs()
    assert not bool(difference.isnan().any())
    if difference.numel():
        assert difference.max().item() <= 4 * unit * max(1.0, expected.abs().max().item())
        assert difference.norm() <= unit * expected.double().norm()
