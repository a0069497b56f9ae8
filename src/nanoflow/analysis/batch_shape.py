"""What of a batch decides its cost: token counts and attended keys, summed over requests.

The cost model needs no more than these seven numbers of an iteration, so they are taken from a `BatchPlan` in a few
vectorised lines (it happens every iteration) or written down for a batch that never ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow.core.batch import BatchPlan
from nanoflow.core.errors import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """The composition of one dense batch; every field is a count.

    A pair is one query token and one key that it attends to. `decode_context` counts the keys of all decode tokens
    (each attends to its whole context, itself included), `prefill_context` the keys that all chunks read (once a
    chunk), `prefill_pairs` the causal pairs inside chunks and with the context before them. `n_sampled` rows get
    logits and a token.
    """

    n_decode: int = 0
    decode_context: int = 0
    n_prefill: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    n_sampled: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"{name} of a batch must not be negative, it is {value}.")

    @property
    def n_tokens(self) -> int:
        """Tokens of the dense batch."""
        return self.n_decode + self.n_prefill

    @property
    def pairs(self) -> int:
        """Pairs of query and key over all requests."""
        return self.decode_context + self.prefill_pairs

    @property
    def context(self) -> int:
        """Keys read from the cache over all requests."""
        return self.decode_context + self.prefill_context


def uniform_batch(n_decode: int, decode_context: int, n_chunks: int = 0, chunk: int = 0, before: int = 0) -> BatchShape:
    """`n_decode` requests with `decode_context` keys each, and `n_chunks` prefill chunks of `chunk` tokens.

    `before` tokens of each chunk's prompt are in the cache already. Every decode token samples; no chunk does.
    """
    pairs_a_chunk = chunk * before + chunk * (chunk + 1) // 2
    return BatchShape(
        n_decode=n_decode,
        decode_context=n_decode * decode_context,
        n_prefill=n_chunks * chunk,
        prefill_pairs=n_chunks * pairs_a_chunk,
        prefill_context=n_chunks * (before + chunk),
        n_sampled=n_decode,
    )


def batch_shape_of(plan: BatchPlan, window: int | None = None) -> BatchShape:
    """The shape of a planned iteration; with a sliding `window`, keys outside it are not counted.

    Vectorised over the R requests: well under 50 µs at R = 1000.
    """
    n_decode = plan.n_decode
    context_r = plan.context_len.astype(np.int64)
    decode_r, chunk_context_r = context_r[:n_decode], context_r[n_decode:]
    query_r = np.diff(plan.query_start[n_decode:]).astype(np.int64)
    if window is None:
        decode_context = int(decode_r.sum())
        pairs = int((query_r * chunk_context_r - query_r * (query_r - 1) // 2).sum())
        chunk_keys = int(chunk_context_r.sum())
    else:
        decode_context = int(np.minimum(decode_r, window).sum())
        pairs = int((_windowed_sum(chunk_context_r, window) - _windowed_sum(chunk_context_r - query_r, window)).sum())
        chunk_keys = int(np.minimum(chunk_context_r, query_r + window - 1).sum())
    return BatchShape(
        n_decode=n_decode,
        decode_context=decode_context,
        n_prefill=plan.n_tokens - n_decode,
        prefill_pairs=pairs,
        prefill_context=chunk_keys,
        n_sampled=len(plan.sampling.token_rows),
    )


def _windowed_sum(n: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    """Σ min(i, window) for i = 1 … n: the keys that the first n tokens of a sequence attend to."""
    inside = np.minimum(n, window)
    keys: npt.NDArray[np.int64] = inside * (inside + 1) // 2 + (n - inside) * window
    return keys
