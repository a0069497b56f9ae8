"""The oracle itself, against torch's own attention and double-precision arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.kernels import reference_attention
from nanoflow.kernels.base import ExpertWeights
from nanoflow.kernels.reference import ReferenceKernels
from tests.kernels.helpers import PagedCase, close


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [5, 33, 1], [0, 20, 0]])
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("budget", [1 << 24, 200])
def test_attention_is_torchs(
    reference: ReferenceKernels, monkeypatch: pytest.MonkeyPatch, query_lens: list[int], window: int | None, budget: int
) -> None:
    monkeypatch.setattr(reference_attention, "SCORE_BUDGET", budget)
    torch.manual_seed(0)
    case = PagedCase.random(4, 2, 32, [20, 33, 1], torch.float32)
    qkv, kv = case.append(reference, torch.float32)
    actual = case.attend(reference, (qkv, kv), query_lens, window=window, gap=1)
    row, first = 0, 0
    for length, context in zip(query_lens, case.contexts, strict=True):
        tokens = qkv[first : first + context].unflatten(1, (-1, 32)).transpose(0, 1)
        visible = torch.ones(length, context).tril(context - length).bool()
        if window is not None:
            visible &= torch.ones(length, context).triu(context - length - window + 1).bool()
        if length:
            expected = F.scaled_dot_product_attention(
                tokens[None, :4, context - length :],
                _rotated_keys(tokens[4:6])[None],
                tokens[None, 6:],
                visible,
                enable_gqa=True,
            )
            close(actual[row : row + length], expected[0].transpose(0, 1).flatten(1))
        assert bool((actual[row + length] == 7).all())
        row, first = row + length + 1, first + context


def _rotated_keys(keys_gte: Tensor) -> Tensor:
    """The rotary embedding as a product of complex numbers, keys at positions 0, 1, ..."""
    n_tokens, head_dim = keys_gte.shape[1:]
    angle = torch.arange(n_tokens)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    real, imaginary = keys_gte.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_linear_sums_in_float32_and_rounds_once(reference: ReferenceKernels) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    out = torch.randn(9, 50).bfloat16() * 100
    expected = (out.double() + x.double() @ weight.double().t()).float().bfloat16()
    reference.linear(x, reference.linear_weight(weight), out, accumulate=True)
    assert (out != expected).float().mean().item() < 0.01
    logits = torch.empty(9, 50)
    reference.linear(x, reference.linear_weight(weight), logits)
    close(logits, x.double() @ weight.double().t(), scale=2)


def test_experts_are_a_weighted_sum(reference: ReferenceKernels) -> None:
    torch.manual_seed(0)
    x, out = torch.randn(11, 12), torch.randn(11, 12)
    router, gate_up, down = torch.randn(5, 12), torch.randn(5, 16, 12), torch.randn(5, 12, 8)
    expected = out.clone()
    for token in range(11):
        probs = torch.softmax(router @ x[token], dim=0)
        best = probs.argsort(descending=True)[:2]
        for expert in best.tolist():
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += probs[expert] / probs[best].sum() * (down[expert] @ (F.silu(gate) * up))
    weights = ExpertWeights(
        reference.linear_weight(router),
        tuple(map(reference.linear_weight, gate_up)),
        tuple(map(reference.linear_weight, down)),
        2,
        True,
    )
    reference.experts(x, weights, out)
    close(out, expected, scale=2)
