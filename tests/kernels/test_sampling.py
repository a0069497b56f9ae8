"""Sampling of both backends: filters against brute force, distributions by chi-square, equal tokens for equal keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.kernels import noise
from nanoflow.kernels.base import Kernels
from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels


@pytest.fixture(params=["reference", "native"])
def kernels(request: pytest.FixtureRequest, reference: ReferenceKernels) -> Kernels:
    if request.param == "reference":
        return reference
    chosen: NativeKernels = request.getfixturevalue("native_f32")
    return chosen


def draw(
    kernels: Kernels, logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """One token a row, key of row r = f(r)."""
    n = logits.shape[0]
    keys = torch.from_numpy(noise.row_keys(np.arange(n), np.zeros(n, dtype=np.int32)))
    out = torch.full((n,), -1, dtype=torch.int32)
    kernels.sample(
        logits,
        torch.full((n,), temperature),
        torch.full((n,), top_k, dtype=torch.int32),
        torch.full((n,), top_p),
        torch.full((n,), min_p),
        keys,
        out,
    )
    return out


def kept_by_brute_force(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities (V) after the filters, by the words of `Kernels.sample`, for logits without ties."""
    probs = torch.softmax(logits.double() / temperature, dim=0)
    order = probs.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    nucleus, mass, total = [], 0.0, sum(probs[i].item() for i in kept)
    for i in kept:
        nucleus.append(i)
        mass += probs[i].item()
        if mass >= top_p * total and top_p < 1.0:
            break
    chosen = [i for i in nucleus if probs[i] >= min_p * probs.max()]
    result = torch.zeros_like(probs)
    result[chosen] = probs[chosen]
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (1.0, 7, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 0, 1.0, 0.2),
        (2.0, 20, 0.9, 0.1),
        (1.0, 1, 1.0, 0.0),
    ],
)
def test_distribution(kernels: Kernels, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    n, vocab = 20_000, 37
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 2
    expected = kept_by_brute_force(logits, temperature, top_k, top_p, min_p) * n
    counts = torch.bincount(draw(kernels, logits.repeat(n, 1), temperature, top_k, top_p, min_p), minlength=vocab)
    assert int(counts[expected == 0].sum()) == 0
    likely = expected > 5
    degrees = int(likely.sum()) - 1
    statistic = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum().item()
    assert statistic < degrees + 5 * (2 * max(degrees, 1)) ** 0.5


def test_greedy_takes_the_largest(kernels: Kernels) -> None:
    logits = torch.randn(9, 1003, generator=torch.Generator().manual_seed(0))
    logits[:, 70:75] = float("-inf")
    assert torch.equal(draw(kernels, logits, temperature=0.0).long(), logits.argmax(-1))
    assert torch.equal(draw(kernels, logits, temperature=1e-6).long(), logits.argmax(-1))
    assert torch.equal(draw(kernels, logits, top_p=1e-9).long(), logits.argmax(-1))
    assert torch.equal(draw(kernels, logits, min_p=1.0).long(), logits.argmax(-1))


def test_forbidden_tokens_are_never_drawn(kernels: Kernels) -> None:
    logits = torch.full((500, 40), float("-inf"))
    logits[:, 13] = -50.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.01}, {"temperature": 0.0}):
        assert bool((draw(kernels, logits, **options) == 13).all())


def test_a_row_does_not_depend_on_its_neighbours(kernels: Kernels) -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1))
    whole = draw(kernels, logits, top_k=50, top_p=0.9)
    assert torch.equal(draw(kernels, logits[:1], top_k=50, top_p=0.9), whole[:1])
    whole = draw(kernels, logits)
    assert torch.equal(draw(kernels, logits[:1]), whole[:1])


@pytest.mark.parametrize("vocab", [1, 5, 16, 1000, 49152])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 100, "top_p": 0.7, "min_p": 0.01, "temperature": 0.7},
    ],
    ids=str,
)
def test_backends_draw_the_same_tokens(
    native_f32: NativeKernels, reference: ReferenceKernels, vocab: int, options: dict[str, Any]
) -> None:
    rows = 40 if vocab < 10_000 else 12
    logits = torch.randn(rows, vocab + 3, generator=torch.Generator().manual_seed(vocab))[:, :vocab] * 3
    assert torch.equal(draw(native_f32, logits, **options), draw(reference, logits, **options))


def test_rows_of_one_call_may_differ_in_kind(native_f32: NativeKernels, reference: ReferenceKernels) -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(2))
    arguments = (
        torch.tensor([0.0, 1.0, 0.7, 1.0, 0.0]),
        torch.tensor([0, 0, 5, 9999, 3], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 0.1]),
        torch.tensor([0.0, 0.0, 0.0, 0.1, 0.5]),
        torch.arange(5) * 2**40,
    )
    ours, theirs = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    native_f32.sample(logits, *arguments, ours)
    reference.sample(logits, *arguments, theirs)
    assert torch.equal(ours, theirs)
    assert ours[0].item() == logits[0].argmax().item()


def test_ties_at_the_threshold_are_all_kept(kernels: Kernels) -> None:
    logits = torch.zeros(3000, 8)
    logits[:, 5:] = -1.0
    drawn = draw(kernels, logits, top_k=2)
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}
