"""Which request rates are sustained within which limits, and the search for the highest one.

A sweep may be judged by several limits of seconds an output token at once, so that one loaded engine serves all. The
numbers of the first limit have plain names (`sustained`, `goodput_rps`); those of the others end in the limit
(`sustained_100ms`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

MOST_BISECTIONS = 8
DOUBLINGS = 16
LIMIT = "limit_s_per_token"
HIGHEST = "highest_sustained_rate_rps"

Probe = Callable[[float], Awaitable[bool]]
"""Measures a rate and says whether it was sustained."""


def mark_of(limit_s: float, limits_s: Sequence[float]) -> str:
    """What the names of this limit's numbers end in."""
    return "" if limit_s == limits_s[0] else f"_{1e3 * limit_s:g}ms"


def limits_of(numbers: Mapping[str, float]) -> dict[str, float]:
    """The limits that a rate was judged by, in seconds a token, by the mark of their numbers; the first one first."""
    found = {name.removeprefix(LIMIT): value for name, value in numbers.items() if name.startswith(LIMIT)}
    return dict(sorted(found.items(), key=lambda entry: (entry[0] != "", -entry[1])))


def judged(
    normalised_s: Sequence[float], second_half_s: Sequence[float], n: int, offered_rps: float, limits_s: Sequence[float]
) -> dict[str, float]:
    """A rate by each limit. `normalised_s` are the latencies a token of the answered ones of `n` requests,
    `second_half_s` those of the ones that arrived in the second half.
    """
    found: dict[str, float] = {}
    for limit_s in limits_s:
        mark, within = mark_of(limit_s, limits_s), sum(value <= limit_s for value in normalised_s)
        found |= {
            f"within_limit_percent{mark}": 100.0 * within / n,
            f"goodput_rps{mark}": offered_rps * within / n,
            f"{LIMIT}{mark}": limit_s,
            f"sustained{mark}": float(len(normalised_s) == n and float(np.mean(second_half_s)) <= limit_s),
        }
    return found


def highest(rates: Mapping[float, Mapping[str, float]], limits_s: Sequence[float]) -> dict[str, float]:
    """The highest rate that was sustained within each limit, of the numbers by rate; nothing where none was."""
    found: dict[str, float] = {}
    for mark in (mark_of(limit_s, limits_s) for limit_s in limits_s):
        good = [rate for rate, numbers in rates.items() if numbers[f"sustained{mark}"]]
        if good:
            found[HIGHEST + mark] = max(good)
    return found


async def highest_sustained(probe: Probe, known: dict[float, bool], resolution: float, lowest_rps: float = 0.0) -> None:
    """Double (or halve) from what is known until the limit is passed, then bisect; fills `known`.

    Halving ends above `lowest_rps`: a limit that one request alone does not keep is kept at no rate.
    """
    low = max((rate for rate, good in known.items() if good), default=None)
    high = min((rate for rate, good in known.items() if not good and rate > (low or 0.0)), default=None)
    for _ in range(DOUBLINGS):
        if low is not None and high is not None:
            break
        rate = 2.0 * low if low is not None else 0.5 * (high or 1.0)
        if rate < lowest_rps and low is None:
            return
        known[rate] = await probe(rate)
        low, high = (rate, high) if known[rate] else (low, rate)
    for _ in range(MOST_BISECTIONS):
        if low is None or high is None or high / low - 1.0 <= resolution:
            return
        rate = round((low * high) ** 0.5, 4)
        known[rate] = await probe(rate)
        low, high = (rate, high) if known[rate] else (low, rate)
