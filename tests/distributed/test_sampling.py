"""Ranks that compare their best tokens choose what one rank chooses from all logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoflow.distributed.sampling import choose
from nanoflow.distributed.sharding import partition
from nanoflow.kernels import noise
from nanoflow.kernels.reference import ReferenceKernels
from tests.distributed.in_process import collectives, on_each

N_ROWS, N_VOCAB = 40, 1003


def test_a_shifted_key_draws_the_noise_of_later_tokens() -> None:
    keys = torch.tensor([0, -1, 2**62 + 12345, -(2**63)], dtype=torch.int64)
    whole = noise.uniform(keys, 700)
    for start in (0, 1, 333, 699):
        assert torch.equal(noise.uniform(noise.shifted(keys, start), 700 - start), whole[:, start:])
    tokens = torch.tensor([5, 0, 699, 17], dtype=torch.int32)
    expected = noise.gumbel(keys, 700).gather(1, tokens.long()[:, None])[:, 0]
    assert torch.equal(noise.gumbel_of(keys, tokens), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_choose_like_one(ranks: int, tmp_path: Path) -> None:
    torch.manual_seed(ranks)
    kernels = ReferenceKernels()
    logits = torch.randn(N_ROWS, N_VOCAB) * 3
    logits[3, [10, 600, 1002]] = 50.0  # equal ones: the lowest wins
    temperature = torch.rand(N_ROWS) * 2
    temperature[:8] = 0.0
    keys = torch.randint(-(2**63), 2**63 - 1, (N_ROWS,), dtype=torch.int64)
    zeros, ones = torch.zeros(N_ROWS), torch.ones(N_ROWS)
    wanted = torch.empty(N_ROWS, dtype=torch.int32)
    kernels.sample(logits, temperature, zeros.int(), ones, zeros, keys, wanted)
    assert wanted[3] == 10
    spans, each = partition(N_VOCAB, ranks), collectives(tmp_path, ranks)

    def of_rank(rank: int) -> torch.Tensor:
        out = torch.empty(N_ROWS, dtype=torch.int32)
        part = logits[:, spans[rank].slice].contiguous()
        choose(part, temperature, keys, out, part=spans[rank], ranks=ranks, kernels=kernels, collectives=each[rank])
        return out

    for found in on_each(ranks, of_rank):
        assert torch.equal(found, wanted)


def test_collectives(tmp_path: Path) -> None:
    each = collectives(tmp_path, 2)

    def of_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.full((4, 6), float(rank + 1))
        rows = x[1:3]
        each[rank].all_reduce(rows)  # rows of a larger buffer, in place
        gathered = torch.empty(2, 4, 6)
        each[rank].all_gather(x, gathered)
        scattered = torch.empty(4, 6)
        each[rank].reduce_scatter(gathered, scattered)
        return x, gathered, scattered

    (x0, gathered, first), (x1, other, second) = on_each(2, of_rank)
    assert x0[0, 0] == 1 and x1[3, 0] == 2 and torch.equal(x0[1:3], torch.full((2, 6), 3.0))
    assert torch.equal(gathered, torch.stack([x0, x1])) and torch.equal(gathered, other)
    assert torch.equal(first, 2 * x0) and torch.equal(second, 2 * x1)
