"""Every operation but attention against the reference in float32, on any device: one check a function.

Inputs are fresh random values, outputs are poisoned with NaN before each run, and both are slices of wider buffers.
The bound is on ‖difference‖ / ‖expected‖, by what one rounding of the type costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoflow.kernels import noise
from nanoflow.kernels.base import ExpertWeights, Kernels
from nanoflow.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def close(actual: Tensor, expected: Tensor, bound: float | None = None) -> None:
    """‖actual - expected‖ ≤ bound · ‖expected‖; never true of NaN."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    limit = BOUNDS[actual.dtype] if bound is None else bound
    assert difference.item() <= limit, f"differs by {difference.item():g} of the norm, allowed {limit:g}"


def random(rows: int, columns: int, dtype: torch.dtype, device: str, extra: int = 8) -> Tensor:
    """Standard normal (rows, columns), a column slice of a wider buffer."""
    return torch.randn(rows, columns + extra, device=device).to(dtype)[:, :columns]


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: str, extra: int = 8) -> Tensor:
    """NaN (rows, columns), a column slice of a wider buffer."""
    return torch.full((rows, columns + extra), float("nan"), dtype=dtype, device=device)[:, :columns]


def check_linear(
    kernels: Kernels,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    *,
    bias: bool = False,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    """`sizes`: tokens, output width, input width."""
    n_tokens, width, depth = sizes
    x, weight = random(n_tokens, depth, dtype, device), torch.randn(width, depth, device=device).to(dtype)
    bias_n = torch.randn(width, device=device).to(dtype) * 4 if bias else None
    make = random if accumulate else poisoned
    out = make(n_tokens, width, out_dtype or dtype, device)
    expected = out.float() if accumulate else torch.zeros(n_tokens, width, device=device)
    expected = expected + x.float() @ weight.float().t() + (0.0 if bias_n is None else bias_n.float())
    kernels.linear(x, kernels.linear_weight(weight.clone()), out, bias_n=bias_n, accumulate=accumulate)
    close(out, expected, 1e-4 if out.dtype == torch.float32 else None)


def check_linear_silu_mul(
    kernels: Kernels, device: str, dtype: torch.dtype, sizes: tuple[int, int, int], *, bias: bool = False
) -> None:
    """`sizes`: tokens, feed-forward width, input width."""
    n_tokens, hidden, depth = sizes
    x = random(n_tokens, depth, dtype, device)
    weight = torch.randn(2 * hidden, depth, device=device).to(dtype) / depth**0.5
    bias_n = torch.randn(2 * hidden, device=device).to(dtype) if bias else None
    product = x.float() @ weight.float().t() + (0.0 if bias_n is None else bias_n.float())
    expected = torch.nn.functional.silu(product[:, :hidden]) * product[:, hidden:]
    out = poisoned(n_tokens, hidden, dtype, device)
    scratch = poisoned(n_tokens, 2 * hidden, dtype, device)
    kernels.linear_silu_mul(x, kernels.gate_up_weight(weight.clone()), scratch, out, bias_n=bias_n)
    close(out, expected, 1e-4 if dtype == torch.float32 else 2 * BOUNDS[dtype])


def check_silu_mul(kernels: Kernels, device: str, dtype: torch.dtype, n_tokens: int, hidden: int) -> None:
    gate_up, out = random(n_tokens, 2 * hidden, dtype, device), poisoned(n_tokens, hidden, dtype, device)
    kernels.silu_mul(gate_up, out)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(out, torch.nn.functional.silu(gate) * up)


def check_rms_norm(
    kernels: Kernels, device: str, dtype: torch.dtype, x_dtype: torch.dtype, n_tokens: int, width: int
) -> None:
    x, weight = random(n_tokens, width, x_dtype, device) * 3, torch.randn(width, device=device).to(dtype)
    out, expected = poisoned(n_tokens, width, dtype, device), torch.empty(n_tokens, width, device=device)
    kernels.rms_norm(x, weight, 1e-5, out)
    REFERENCE.rms_norm(x.float(), weight.float(), 1e-5, expected)
    close(out, expected)


def check_embed(kernels: Kernels, device: str, dtype: torch.dtype, out_dtype: torch.dtype, width: int) -> None:
    table = torch.randn(77, width, device=device).to(dtype)
    ids = torch.randint(0, 77, (33,), dtype=torch.int32, device=device)
    out = poisoned(33, width, out_dtype, device)
    kernels.embed(ids, kernels.linear_weight(table.clone()), out)
    assert torch.equal(out, table[ids.long()].to(out_dtype))


def check_rope_append(
    kernels: Kernels, device: str, dtype: torch.dtype, heads: tuple[int, int, int], *, norm: bool, n_tokens: int = 19
) -> None:
    """`heads`: query heads, KV heads, head dimension. Some rows are padding; unwritten pages keep what they held."""
    n_heads, n_kv_heads, head_dim = heads
    page_tokens, n_pages = 16, 7
    qkv = random(n_tokens, (n_heads + 2 * n_kv_heads) * head_dim, dtype, device)
    positions = torch.randint(0, 90, (n_tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(n_pages * page_tokens, device=device)[:n_tokens].int()
    slots[2::5] = -1
    angle = torch.arange(90)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).float().to(device)
    norms = [torch.randn(head_dim, device=device).to(dtype) if norm else None for _ in range(2)]
    options: dict[str, Any] = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "eps": 1e-6}
    pages = torch.randn(n_pages, 2, n_kv_heads, page_tokens, head_dim, device=device).to(dtype)
    wide, wide_pages = qkv.float().clone(), pages.float().clone()
    q_norm, k_norm = (None if weight is None else weight.float() for weight in norms)
    REFERENCE.rope_append(wide, positions, slots, cos_sin, wide_pages, q_norm_e=q_norm, k_norm_e=k_norm, **options)
    kernels.rope_append(qkv, positions, slots, cos_sin, pages, q_norm_e=norms[0], k_norm_e=norms[1], **options)
    real = slots >= 0
    d_q = n_heads * head_dim
    close(qkv[real, :d_q], wide[real, :d_q])
    close(pages, wide_pages)


def sampling_arguments(n_rows: int, device: str) -> tuple[Tensor, ...]:
    """temperature, top-k, top-p, min-p and keys of rows of every kind, in turn."""
    kinds = [
        (1.0, 0, 1.0, 0.0),
        (0.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 50, 0.9, 0.01),
        (1.0, 0, 1.0, 0.1),
        (1.0, 7, 0.5, 0.0),
        (1e-6, 0, 1.0, 0.0),
        (2.0, 10**6, 0.95, 0.02),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 0.0, 0.0),
        (0.0, 3, 0.1, 0.5),
    ]
    columns = list(zip(*(kinds[row % len(kinds)] for row in range(n_rows)), strict=True))
    keys = torch.from_numpy(noise.row_keys(np.arange(n_rows), np.zeros(n_rows, dtype=np.int32)))
    types = (torch.float32, torch.int32, torch.float32, torch.float32)
    return *(torch.tensor(c, dtype=t, device=device) for c, t in zip(columns, types, strict=True)), keys.to(device)


def check_sample(
    kernels: Kernels, device: str, dtype: torch.dtype, n_rows: int, vocab: int, *, unequal: int = 0, plain: bool = False
) -> None:
    """Tokens equal the reference's, but for `unequal` rows (near ties); `plain`: temperature 1 alone."""
    logits = random(n_rows, vocab, dtype, device) * 3
    before = logits.clone()
    arguments = sampling_arguments(n_rows, device)
    if plain:
        fill = (1.0, 0, 1.0, 0.0)
        arguments = (*(torch.full_like(a, v) for a, v in zip(arguments, fill, strict=False)), arguments[4])
    out = torch.full((n_rows,), -1, dtype=torch.int32, device=device)
    expected = out.clone()
    kernels.sample(logits, *arguments, out)
    REFERENCE.sample(logits.float(), *arguments, expected)
    assert torch.equal(logits, before)
    assert bool(((out >= 0) & (out < vocab)).all())
    assert int((out != expected).sum()) <= unequal


def check_experts(
    kernels: Kernels,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    *,
    normalise: bool,
    bound: float | None = None,
    held: range | None = None,
) -> None:
    """`sizes`: tokens, model width, feed-forward width, experts, active experts. `held`: those of this rank."""
    n_tokens, width, hidden, n_experts, n_active = sizes

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device=device).to(dtype) / k**0.5

    router = weight(n_experts, width) * 2
    router[: n_experts // 4] = 0.0  # some experts that few tokens choose
    gate_up = [weight(2 * hidden, width) for _ in range(n_experts)]
    down = [weight(width, hidden) for _ in range(n_experts)]
    held = held or range(n_experts)
    for absent in set(range(n_experts)) - set(held):
        down[absent].zero_()
    x, out = random(n_tokens, width, dtype, device), random(n_tokens, width, dtype, device)
    expected, again = out.float().clone(), out.clone()
    wide = ExpertWeights(
        REFERENCE.linear_weight(router.float()),
        REFERENCE.expert_weights((w.float() for w in gate_up), n_experts, gate_up=True),
        REFERENCE.expert_weights((w.float() for w in down), n_experts, gate_up=False),
        n_active,
        normalise,
    )
    ours = ExpertWeights(
        kernels.linear_weight(router.clone()),
        kernels.expert_weights((gate_up[number].clone() for number in held), len(held), gate_up=True),
        kernels.expert_weights((down[number].clone() for number in held), len(held), gate_up=False),
        n_active,
        normalise,
        held.start,
    )
    REFERENCE.experts(x.float(), wide, expected)
    kernels.experts(x, ours, out)
    kernels.experts(x, ours, again)
    assert torch.equal(out, again), "the same inputs gave two results"
    close(out, expected, bound or (1e-5 if dtype == torch.float32 else 2 * BOUNDS[dtype]))
