"""Random inputs for kernel tests and the comparison that knows each element type's precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow.kernels.base import AttentionPlan, Kernels


def close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Equal up to the rounding of the element type, relative to the largest expected value."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[actual.dtype] * scale
    difference = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    bound = tolerance * max(1.0, expected.double().abs().max().item() if expected.numel() else 1.0)
    assert difference <= bound, f"differs by {difference:g}, allowed {bound:g}"


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(rows: int, width: int, dtype: torch.dtype, extra: int = 5) -> Tensor:
    """Random (rows, width), a column slice of a wider buffer."""
    return torch.randn(rows, width + extra).to(dtype)[:, :width]


def cos_sin(n_positions: int, head_dim: int) -> Tensor:
    angle = torch.arange(n_positions)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


@dataclass
class PagedCase:
    """Requests whose whole contexts are appended to a backend's pages, shuffled, and queried at the end."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    contexts: list[int]
    page_tokens: int
    qkv_tn: Tensor  # all tokens of all requests
    page_table: Tensor

    @staticmethod
    def random(
        n_heads: int, n_kv_heads: int, head_dim: int, contexts: list[int], dtype: torch.dtype, page_tokens: int = 16
    ) -> PagedCase:
        width = (n_heads + 2 * n_kv_heads) * head_dim
        widest = max(-(-c // page_tokens) for c in contexts)
        pages = torch.randperm(widest * len(contexts) + 3)[: widest * len(contexts)]
        table = pages.view(len(contexts), widest).int()
        return PagedCase(
            n_heads, n_kv_heads, head_dim, contexts, page_tokens, torch.randn(sum(contexts), width).to(dtype), table
        )

    def append(self, kernels: Kernels, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(rotated qkv, kv layer) after `rope_append` of every token."""
        kv = kernels.allocate_kv(
            self.page_table.numel() + 3, self.page_tokens, self.n_kv_heads, self.head_dim, dtype, 1
        )[0]
        positions = torch.cat([torch.arange(c) for c in self.contexts])
        request = torch.repeat_interleave(torch.arange(len(self.contexts)), torch.tensor(self.contexts))
        pages = self.page_table[request, positions // self.page_tokens]
        slots = (pages * self.page_tokens + positions % self.page_tokens).int()
        qkv = self.qkv_tn.clone()
        kernels.rope_append(
            qkv,
            positions.int(),
            slots,
            cos_sin(max(self.contexts), self.head_dim),
            kv,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
        )
        return qkv, kv

    def plan(
        self, query_lens: list[int], contexts: list[int] | None = None, gap: int = 0
    ) -> tuple[AttentionPlan, Tensor]:
        """A plan whose requests query their last tokens (`gap` unowned rows between), and their rows of `qkv`."""
        contexts = contexts or self.contexts
        starts, rows, n_rows, first = [], [], 0, 0
        for length, context, whole in zip(query_lens, contexts, self.contexts, strict=True):
            starts.append(n_rows)
            rows.append(torch.arange(first + context - length, first + context))
            rows.append(torch.zeros(gap, dtype=torch.long))
            n_rows += length + gap
            first += whole
        plan = AttentionPlan(
            int32(starts),
            int32(query_lens),
            int32(contexts),
            self.page_table,
            len(contexts),
            max(query_lens),
            max(contexts),
        )
        return plan, torch.cat(rows)

    def attend(
        self,
        kernels: Kernels,
        appended: tuple[Tensor, Tensor],
        query_lens: list[int],
        contexts: list[int] | None = None,
        window: int | None = None,
        gap: int = 0,
    ) -> Tensor:
        """Attention output (rows, heads · head_dim); rows nobody owns stay 7."""
        qkv, kv = appended
        plan, rows = self.plan(query_lens, contexts, gap)
        width = self.n_heads * self.head_dim
        buffer = torch.full((len(rows), width + 3), 7.0, dtype=qkv.dtype)
        out = buffer[:, :width]
        kernels.attention(
            qkv[rows],
            kv,
            plan,
            out,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=window,
        )
        assert bool((buffer[:, width:] == 7).all())
        return out
