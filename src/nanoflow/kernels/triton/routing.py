"""Which expert gets which token, on the device and in fixed shapes: router top-k, then a stable sort by expert.

Every (token, chosen expert) pair gets a slot. The slots of an expert are consecutive and rounded up to whole row tiles
of the grouped product, so that each tile needs one expert's weight. No atomics: the order is that of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow.kernels.triton import launch

_BLOCK = 1024


@triton.jit
def _choose(
    logits_ptr,
    expert_ptr,
    score_ptr,
    slot_ptr,
    N_EXPERTS: tl.constexpr,
    N_ACTIVE: tl.constexpr,
    NORMALISE: tl.constexpr,
    FIRST: tl.constexpr,
    N_HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block a token: the likeliest experts, best first (the lowest of equals), and their probabilities.

    Experts are told by their number among those held here; of the others expert and slot are -1.
    """
    token = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK)
    logit = tl.load(logits_ptr + token * N_EXPERTS + x, mask=x < N_EXPERTS, other=float("-inf"))
    weight = tl.exp(logit - tl.max(logit, 0))
    whole = tl.sum(weight, 0)
    left = tl.where(x < N_EXPERTS, weight, -1.0)
    if NORMALISE:
        whole = 0.0
        for _ in range(N_ACTIVE):
            best = tl.max(left, 0)
            whole += best
            left = tl.where(x == tl.min(tl.where(left == best, x, BLOCK), 0), -1.0, left)
        left = tl.where(x < N_EXPERTS, weight, -1.0)
    for rank in range(N_ACTIVE):
        best = tl.max(left, 0)
        chosen = tl.min(tl.where(left == best, x, BLOCK), 0)
        left = tl.where(x == chosen, -1.0, left)
        if N_HELD < N_EXPERTS:
            held = (chosen >= FIRST) & (chosen < FIRST + N_HELD)
            tl.store(expert_ptr + token * N_ACTIVE + rank, tl.where(held, chosen - FIRST, -1))
            tl.store(slot_ptr + token * N_ACTIVE + rank, -1)
        else:
            tl.store(expert_ptr + token * N_ACTIVE + rank, chosen)
        tl.store(score_ptr + token * N_ACTIVE + rank, best / whole)


@triton.jit
def _count(expert_ptr, count_ptr, n_pairs, BLOCK: tl.constexpr):
    """One block an expert: how many pairs chose it."""
    expert = tl.program_id(0)
    hits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hits += (tl.load(expert_ptr + pair, mask=pair < n_pairs, other=-1) == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(hits, 0))


@triton.jit
def _place(
    expert_ptr,
    count_ptr,
    slot_ptr,
    token_ptr,
    tiles_ptr,
    n_pairs,
    N_EXPERTS: tl.constexpr,
    N_ACTIVE: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block an expert: the slots of its pairs, the token of each slot (-1: none), the expert of each row tile."""
    expert = tl.program_id(0)
    x = tl.arange(0, EXPERTS_BLOCK)
    tiles_x = (tl.load(count_ptr + x, mask=x < N_EXPERTS, other=0) + TILE - 1) // TILE
    first_tile = tl.sum(tl.where(x < expert, tiles_x, 0), 0)
    n_own = tl.load(count_ptr + expert)
    n_tiles = (n_own + TILE - 1) // TILE
    if expert == N_EXPERTS - 1:
        tl.store(tiles_ptr, first_tile + n_tiles)
    for tile in range(n_tiles):
        tl.store(tiles_ptr + 1 + first_tile + tile, expert)
    next_slot = first_tile * TILE
    end = next_slot + n_tiles * TILE
    for start in range(0, n_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hit = tl.load(expert_ptr + pair, mask=pair < n_pairs, other=-1) == expert
        hits = hit.to(tl.int32)
        slot = next_slot + tl.cumsum(hits, 0) - 1
        tl.store(slot_ptr + pair, slot, mask=hit)
        tl.store(token_ptr + slot, pair // N_ACTIVE, mask=hit)
        next_slot += tl.sum(hits, 0)
    unused = next_slot + tl.arange(0, TILE)
    tl.store(token_ptr + unused, tl.full([TILE], -1, tl.int32), mask=unused < end)


@dataclass(frozen=True)
class Routing:
    """Where the pairs of T tokens went; all on the device."""

    score_tj: Tensor
    """float32 (T, n_active): weight of each chosen expert."""
    slot_tj: Tensor
    """int32 (T, n_active): row of the sorted buffers; -1 where the expert is not held here."""
    token_s: Tensor
    """int32 (slots): the token of a row, -1 for padding; undefined from row tile `tiles[0]` on."""
    tiles: Tensor
    """int32: number of row tiles in use, then the expert of each."""

    @property
    def n_slots(self) -> int:
        """Rows of the sorted buffers, used or not."""
        return self.token_s.shape[0]


def route(
    logits_tx: Tensor, n_active: int, *, normalise: bool, tile: int, first: int = 0, n_held: int | None = None
) -> Routing:
    """Route by float32 router logits (T, experts), in row tiles of `tile`. Shapes depend on shapes alone.

    Held are `n_held` experts (default: all) from number `first` on; pairs of others get no slot.
    """
    (n_tokens, n_all), device = logits_tx.shape, logits_tx.device
    n_experts = n_all if n_held is None else n_held
    n_pairs = n_tokens * n_active
    n_tiles = launch.cdiv(n_pairs + min(n_experts, n_pairs) * (tile - 1), tile)

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    expert_tj, slot_tj, count_x = ints(n_tokens, n_active), ints(n_tokens, n_active), ints(n_experts)
    score_tj = torch.empty(n_tokens, n_active, dtype=torch.float32, device=device)
    routing = Routing(score_tj, slot_tj, ints(n_tiles * tile), ints(1 + n_tiles))
    experts_block = launch.pow2(n_experts)
    block = min(_BLOCK, launch.pow2(n_pairs))
    _choose[(n_tokens,)](
        logits_tx,
        expert_tj,
        score_tj,
        slot_tj,
        N_EXPERTS=n_all,
        N_ACTIVE=n_active,
        NORMALISE=normalise,
        FIRST=first,
        N_HELD=n_experts,
        BLOCK=launch.pow2(n_all),
        num_warps=1,
    )
    _count[(n_experts,)](expert_tj, count_x, n_pairs, BLOCK=block)
    _place[(n_experts,)](
        expert_tj,
        count_x,
        slot_tj,
        routing.token_s,
        routing.tiles,
        n_pairs,
        N_EXPERTS=n_experts,
        N_ACTIVE=n_active,
        TILE=tile,
        EXPERTS_BLOCK=experts_block,
        BLOCK=block,
    )
    return routing
