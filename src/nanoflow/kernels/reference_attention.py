"""Paged attention in plain torch: requests are gathered into padded batches, so that no Python loop runs per request.

Pages are laid out (pages, 2, kv_heads, page_tokens, head_dim). Softmax and sums are float32. Padding is bounded:
requests are grouped until the padded scores would pass `SCORE_BUDGET` elements, and ragged prefill goes one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow.kernels.base import AttentionPlan

SCORE_BUDGET = 1 << 24
"""Most score elements (requests × heads × queries × keys) computed at once: 64 MiB in float32."""


def paged_attention(
    q_the: Tensor, kv_layer: Tensor, plan: AttentionPlan, out_the: Tensor, *, scale: float, window: int | None
) -> None:
    """Write attention of the plan's rows of `q` (t, h, e) over `kv_layer` to the same rows of `out` (t, h, e)."""
    n = plan.n_requests
    if n == 0 or plan.max_query == 0:
        return
    n_heads = q_the.shape[1]
    if plan.max_query == 1:
        step = max(1, SCORE_BUDGET // max(1, n_heads * plan.max_context))
        for first in range(0, n, step):
            _attend(q_the, kv_layer, plan, out_the, slice(first, first + step), (0, 1), plan.max_context, scale, window)
        return
    lengths = zip(plan.query_len[:n].tolist(), plan.context_len[:n].tolist(), strict=True)
    for r, (query_len, context_len) in enumerate(lengths):
        step = max(1, SCORE_BUDGET // max(1, n_heads * context_len))
        for first in range(0, query_len, step):
            rows = (first, min(first + step, query_len))
            _attend(q_the, kv_layer, plan, out_the, slice(r, r + 1), rows, context_len, scale, window)


def _attend(
    q_the: Tensor,
    kv_layer: Tensor,
    plan: AttentionPlan,
    out_the: Tensor,
    requests: slice,
    rows: tuple[int, int],
    max_context: int,
    scale: float,
    window: int | None,
) -> None:
    """Attend with query rows [rows) of each of a group of requests, all padded to `max_context` keys."""
    _, _, n_kv_heads, page_tokens, head_dim = kv_layer.shape
    n_heads, device = q_the.shape[1], q_the.device
    start, query_len = (
        plan.query_start[: plan.n_requests][requests].long(),
        plan.query_len[: plan.n_requests][requests].long(),
    )
    context = plan.context_len[: plan.n_requests][requests].long()
    offset = torch.arange(rows[0], rows[1], device=device)
    owned = (offset[None, :] < query_len[:, None]).reshape(-1)
    row_index = (start[:, None] + offset[None, :]).clamp(0, q_the.shape[0] - 1)

    n_pages = -(-max_context // page_tokens)
    pages = plan.page_table[: plan.n_requests][requests, :n_pages].long().clamp(min=0)
    kv = kv_layer[pages].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float()  # (2, r, g, keys, e)
    q = (
        q_the[row_index].float().unflatten(2, (n_kv_heads, n_heads // n_kv_heads)).permute(0, 2, 3, 1, 4)
    )  # (r, g, h/g, q, e)

    n_requests, n_queries = row_index.shape
    scores = (q.flatten(2, 3) @ kv[0].transpose(-1, -2)).unflatten(2, (-1, n_queries)) * scale
    position = (context - query_len)[:, None] + offset[None, :]
    key = torch.arange(scores.shape[-1], device=device)
    visible = (key <= position[..., None]) & (key < context[:, None, None])
    if window is not None:
        visible &= key > position[..., None] - window
    scores.masked_fill_(~visible[:, None, None], float("-inf"))
    probs = torch.softmax(scores, dim=-1)
    result = (probs.flatten(2, 3) @ kv[1]).unflatten(2, (-1, n_queries)).permute(0, 3, 1, 2, 4)
    result = result.reshape(n_requests * n_queries, n_heads, head_dim).to(out_the.dtype)
    out_the.index_put_((row_index.reshape(-1)[owned],), result[owned])
