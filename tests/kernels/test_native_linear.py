"""Linear layers, embedding and experts of the C++ backend against plain torch, and their independence of the batch."""

from __future__ import annotations

import pytest
import torch

from nanoflow.kernels.base import ExpertWeights
from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels
from tests.kernels.helpers import close, int32, strided

SHAPES = [(1, 1), (5, 3), (16, 2), (17, 33), (50, 64), (64, 63), (130, 127), (960, 576), (100, 1536)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [0, 1, 2, 5, 6, 7, 13, 64, 101])
def test_linear(native: NativeKernels, dtype: torch.dtype, n: int, k: int, m: int) -> None:
    torch.manual_seed(n * 1000 + k + m)
    x, weight, bias = strided(m, k, dtype), torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n).to(dtype)
    packed = native.linear_weight(weight.clone())
    exact = x.double() @ weight.double().t()
    out = strided(m, n, dtype)
    before = out.clone()
    native.linear(x, packed, out)
    close(out, exact)
    native.linear(x, packed, out, bias_n=bias)
    close(out, exact + bias.double())
    out.copy_(before)
    native.linear(x, packed, out, bias_n=bias, accumulate=True)
    close(out, before.double() + exact + bias.double())
    wide = torch.empty(m, n)
    native.linear(x, packed, wide, bias_n=bias.float())
    close(wide, exact + bias.double(), scale=2)


def test_linear_leaves_the_rest_of_the_buffer_alone(native: NativeKernels, dtype: torch.dtype) -> None:
    weight = native.linear_weight(torch.randn(21, 40).to(dtype))
    buffer = torch.full((9, 30), 7.0, dtype=dtype)
    native.linear(torch.randn(5, 40).to(dtype), weight, buffer[2:7, 4:25])
    untouched = torch.ones(9, 30, dtype=torch.bool)
    untouched[2:7, 4:25] = False
    assert bool((buffer[untouched] == 7).all())


@pytest.mark.parametrize(("n", "k"), [(50, 63), (576, 576), (3072, 576)])
def test_a_rows_result_does_not_depend_on_the_batch(native: NativeKernels, dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(130, k).to(dtype), native.linear_weight(torch.randn(n, k).to(dtype))
    whole = torch.empty(130, n, dtype=dtype)
    native.linear(x, weight, whole)
    for m in (1, 2, 3, 4, 5, 6, 7, 12, 31, 64):
        first = 130 - m
        part = torch.empty(m, n, dtype=dtype)
        native.linear(x[first:], weight, part)
        assert torch.equal(part, whole[first:]), f"batch of {m}"


def test_embedding_reads_the_packed_table(native: NativeKernels, dtype: torch.dtype) -> None:
    for n, k in [(1, 1), (70, 33), (200, 64)]:
        weight = torch.randn(n, k).to(dtype)
        packed = native.linear_weight(weight.clone())
        ids = int32([0, n - 1, n // 2, 0])
        out = strided(4, k, dtype)
        native.embed(ids, packed, out)
        assert torch.equal(out, weight[ids.long()])


@pytest.mark.parametrize(("n_experts", "n_active", "normalise"), [(4, 2, True), (16, 4, False), (3, 3, True)])
@pytest.mark.parametrize("n_tokens", [0, 1, 37])
def test_experts(
    native: NativeKernels,
    reference: ReferenceKernels,
    dtype: torch.dtype,
    n_experts: int,
    n_active: int,
    normalise: bool,
    n_tokens: int,
) -> None:
    torch.manual_seed(n_experts + n_tokens)
    d, f = 48, 40
    router = torch.randn(n_experts, d).to(dtype) / d**0.5
    gate_up = [torch.randn(2 * f, d).to(dtype) / d**0.5 for _ in range(n_experts)]
    down = [torch.randn(d, f).to(dtype) / f**0.5 for _ in range(n_experts)]
    x, out = strided(n_tokens, d, dtype), strided(n_tokens, d, dtype)
    results = []
    for kernels in (native, reference):
        weights = ExpertWeights(
            kernels.linear_weight(router.clone()),
            tuple(kernels.linear_weight(w.clone()) for w in gate_up),
            tuple(kernels.linear_weight(w.clone()) for w in down),
            n_active,
            normalise,
        )
        result = out.clone()
        kernels.experts(x, weights, result)
        results.append(result)
    close(results[0], results[1], scale=2)
    if n_tokens > 1:
        weights = ExpertWeights(
            native.linear_weight(router),
            tuple(map(native.linear_weight, gate_up)),
            tuple(map(native.linear_weight, down)),
            n_active,
            normalise,
        )
        alone = out[-1:].clone()
        native.experts(x[-1:], weights, alone)
        assert torch.equal(alone, results[0][-1:])
