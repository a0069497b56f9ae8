"""Admission by predicted peak memory: how much KV the requests will hold at their worst moment, if they decode on as
requests before them did.

Admitting by what is free now would preempt later; admitting by every request's `max_tokens` would leave memory idle.
NanoFlow (OSDI'25, section 4.2) predicts the peak from the average decode length seen so far; so do we, and a wrong
guess costs a preemption, never a request.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nanoflow.core.batch import Int32Array

PRIOR_TOKENS = 256.0
PRIOR_WEIGHT = 8.0
MIN_REMAINING_SHARE = 0.25


class DecodeLengths:
    """Running average of output lengths, begun with a prior of `PRIOR_WEIGHT` requests of `PRIOR_TOKENS`."""

    def __init__(self) -> None:
        self._sum = PRIOR_TOKENS * PRIOR_WEIGHT
        self._count = PRIOR_WEIGHT

    @property
    def mean_tokens(self) -> float:
        return self._sum / self._count

    def observe(self, n_out: int) -> None:
        """Count a request that finished with `n_out` output tokens."""
        self._sum += n_out
        self._count += 1.0

    def remaining(
        self, n_out: Int32Array, max_out: Int32Array, fixed_length: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """Expected further tokens of requests that have `n_out`; exact where the length is fixed.

        A request past the mean is taken to need a quarter of the mean still, since it does run on.
        """
        mean = self.mean_tokens
        guess = np.maximum(mean - n_out, MIN_REMAINING_SHARE * mean)
        left = (max_out - n_out).astype(np.float64)
        return np.where(fixed_length, left, np.minimum(guess, left))


def peak_tokens(held: npt.NDArray[np.float64], remaining: npt.NDArray[np.float64]) -> float:
    """Largest KV need over time, in tokens, if request i holds `held[i]` now, gains one token an iteration and leaves
    after `remaining[i]` more. The peak comes just before some request leaves."""
    if len(held) == 0:
        return 0.0
    order = np.argsort(-remaining, kind="stable")
    still_held = np.cumsum(held[order])
    alive = np.arange(1, len(held) + 1)
    return float((still_held + alive * remaining[order]).max())


def admissible(
    held: npt.NDArray[np.float64],
    remaining: npt.NDArray[np.float64],
    new_held: npt.NDArray[np.float64],
    new_remaining: npt.NDArray[np.float64],
    capacity_tokens: float,
) -> int:
    """How many of the new requests, taken in order, keep the predicted peak within `capacity_tokens`.

    The peak grows with each request, so the largest count is found by bisection.
    """
    low, high = 0, len(new_held)
    while low < high:
        middle = (low + high + 1) // 2
        peak = peak_tokens(
            np.concatenate([held, new_held[:middle]]), np.concatenate([remaining, new_remaining[:middle]])
        )
        if peak <= capacity_tokens:
            low = middle
        else:
            high = middle - 1
    return low
