"""Paged attention and the append to pages: C++ against plain torch, and bitwise independence of chunking and batch."""

from __future__ import annotations

import pytest
import torch

from nanoflow.kernels.native.backend import NativeKernels
from nanoflow.kernels.reference import ReferenceKernels
from tests.kernels.helpers import PagedCase, close, cos_sin, int32, strided

HEADS = [(4, 4, 32), (9, 3, 64), (4, 1, 80), (6, 2, 96), (8, 2, 128), (4, 2, 8), (14, 1, 24)]


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 50])
def test_ragged_batches(
    native: NativeKernels,
    reference: ReferenceKernels,
    dtype: torch.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    window: int | None,
) -> None:
    torch.manual_seed(head_dim)
    case = PagedCase.random(n_heads, n_kv_heads, head_dim, [1, 16, 17, 63, 64, 65, 200], dtype)
    ours, theirs = case.append(native, dtype), case.append(reference, dtype)
    close(ours[0], theirs[0])
    for query_lens in ([1] * 7, [1, 16, 5, 63, 1, 2, 200], [1, 1, 0, 3, 64, 65, 77]):
        actual = case.attend(native, ours, query_lens, window=window, gap=2)
        close(actual, case.attend(reference, theirs, query_lens, window=window, gap=2))


@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts(
    native: NativeKernels, reference: ReferenceKernels, dtype: torch.dtype, window: int | None
) -> None:
    torch.manual_seed(1)
    case = PagedCase.random(6, 2, 64, [2000, 513, 512], dtype, page_tokens=32)
    ours, theirs = case.append(native, dtype), case.append(reference, dtype)
    for query_lens in ([1, 1, 1], [300, 40, 1]):
        actual = case.attend(native, ours, query_lens, window=window)
        close(actual, case.attend(reference, theirs, query_lens, window=window))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80)])
def test_decode_equals_prefill_bitwise(
    native: NativeKernels, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int, window: int | None
) -> None:
    torch.manual_seed(2)
    case = PagedCase.random(n_heads, n_kv_heads, head_dim, [1300, 90], dtype)
    appended = case.append(native, dtype)
    whole = case.attend(native, appended, [1300, 90], window=window)
    for position in (1, 17, 64, 65, 511, 512, 513, 700, 1025, 1300):
        for length in (1, 3, 40):
            if length <= position:
                part = case.attend(native, appended, [length, 1], [position, 1], window=window)
                assert torch.equal(part[:length], whole[position - length : position]), (
                    f"{length} queries up to {position}"
                )


def test_decode_does_not_depend_on_the_batch(native: NativeKernels, dtype: torch.dtype) -> None:
    """One request is divided over threads by spans of keys; among many it is one item. Same bits."""
    torch.manual_seed(3)
    case = PagedCase.random(9, 3, 64, [1100] + [30] * 20, dtype)
    appended = case.append(native, dtype)
    many = case.attend(native, appended, [1] * 21)
    alone = case.attend(native, appended, [1] + [0] * 20)
    assert torch.equal(many[:1], alone[:1])


def test_stale_keys_beyond_the_context_are_not_seen(native: NativeKernels, dtype: torch.dtype) -> None:
    case = PagedCase.random(4, 2, 32, [40], dtype)
    qkv, kv = case.append(native, dtype)
    before = case.attend(native, (qkv, kv), [5], [20])
    tail = PagedCase(4, 2, 32, [40], 16, case.qkv_tn * 3, case.page_table)
    tail.qkv_tn[:20] = case.qkv_tn[:20]
    _, changed = tail.append(native, dtype)
    assert not torch.equal(changed, kv)
    assert torch.equal(case.attend(native, (qkv, changed), [5], [20]), before)


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_query_and_key_norm(
    native: NativeKernels, reference: ReferenceKernels, dtype: torch.dtype, head_dim: int
) -> None:
    torch.manual_seed(4)
    q_norm, k_norm = torch.rand(head_dim).to(dtype) + 0.5, torch.rand(head_dim).to(dtype) + 0.5
    qkv = strided(20, 6 * head_dim, dtype)
    plan_rows = PagedCase(2, 2, head_dim, [20], 16, qkv, int32([3, 1]).view(1, 2))
    outs = []
    for kernels in (native, reference):
        mine = qkv.clone()
        kv = kernels.allocate_kv(5, 16, 2, head_dim, dtype, 1)[0]
        slots = torch.cat((torch.arange(48, 64), torch.arange(16, 20))).int()
        kernels.rope_append(
            mine,
            torch.arange(20).int(),
            slots,
            cos_sin(20, head_dim),
            kv,
            n_heads=2,
            n_kv_heads=2,
            head_dim=head_dim,
            q_norm_e=q_norm,
            k_norm_e=k_norm,
            eps=1e-6,
        )
        outs.append((mine, plan_rows.attend(kernels, (mine, kv), [20])))
    close(outs[0][0], outs[1][0])
    close(outs[0][1], outs[1][1])


def test_rows_without_a_slot_are_not_written(native: NativeKernels, dtype: torch.dtype) -> None:
    kv = native.allocate_kv(2, 16, 1, 16, dtype, 3)
    assert len(kv) == 3
    native.rope_append(
        torch.ones(2, 48, dtype=dtype),
        int32([0, 1]),
        int32([-1, 17]),
        cos_sin(2, 16),
        kv[0],
        n_heads=1,
        n_kv_heads=1,
        head_dim=16,
    )
    assert int(kv[0][0].count_nonzero()) == 0
    assert int(kv[0][1].count_nonzero()) > 0
