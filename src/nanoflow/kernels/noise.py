"""Random numbers for sampling that depend on a key and a vocabulary index alone, so every backend draws the same.

A stateful generator would tie a request's text to its neighbours in the batch. Here the noise of (key, token) is a
hash: `row_keys` mixes a request's seed with the number of tokens it has generated, and each device turns key and
token id into a Gumbel variable. The specification, which each backend repeats:

    k0, k1 = low and high 32 bits of the key
    h = fmix32(v · 0x9E3779B1 + k0);  h = fmix32(h ^ k1)        (fmix32: the finaliser of MurmurHash3)
    u = ((h >> 9) + 0.5) · 2⁻²³                                  (exact in float32, never 0 or 1)
    gumbel = -log(-log(u))

Sources: Steele et al. 2014 (splitmix64), Appleby's MurmurHash3, Gumbel 1954 (the argmax of
logits + noise samples the softmax).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN_64 = np.uint64(0x9E3779B97F4A7C15)
_GOLDEN_32 = 0x9E3779B1
_MASK_32 = 0xFFFFFFFF


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = state + _GOLDEN_64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_keys(
    seeds: npt.NDArray[np.int64] | npt.NDArray[np.uint64], counters: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Keys (S) of the next token of S requests, from `seeds` (S, 64 bits) and `counters` (S, tokens so far)."""
    with np.errstate(over="ignore"):
        mixed = _splitmix64(np.asarray(seeds).astype(np.uint64)) + np.asarray(counters).astype(np.uint64)
        return _splitmix64(mixed).view(np.int64)


def _fmix32(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64 (products wrap, the mask keeps the low half)."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK_32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK_32
    return h ^ (h >> 16)


def _uniform(keys_s1: Tensor, index_sv: Tensor) -> Tensor:
    """The uniform variable of each key and vocabulary index; both int64, shapes broadcast."""
    low, high = keys_s1 & _MASK_32, (keys_s1 >> 32) & _MASK_32
    h = _fmix32((index_sv * _GOLDEN_32 + low) & _MASK_32)
    h = _fmix32(h ^ high)
    return ((h >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform(keys_s: Tensor, n_vocab: int) -> Tensor:
    """Uniform float32 (S, V) in the open interval (0, 1) for int64 keys (S), on the keys' device."""
    index = torch.arange(n_vocab, dtype=torch.int64, device=keys_s.device)
    return _uniform(keys_s.to(torch.int64)[:, None], index[None, :])


def gumbel(keys_s: Tensor, n_vocab: int) -> Tensor:
    """Standard Gumbel noise, float32 (S, V), for int64 keys (S)."""
    return -torch.log(-torch.log(uniform(keys_s, n_vocab)))


def gumbel_of(keys_s: Tensor, tokens_s: Tensor) -> Tensor:
    """The noise of one token a row, float32 (S)."""
    return -torch.log(-torch.log(_uniform(keys_s.to(torch.int64), tokens_s.to(torch.int64))))


def shifted(keys_s: Tensor, start: int) -> Tensor:
    """Keys whose noise for index i is that of `keys_s` for index `start` + i."""
    keys = keys_s.to(torch.int64)
    low = ((keys & _MASK_32) + start * _GOLDEN_32) & _MASK_32
    return (keys & ~_MASK_32) | low
