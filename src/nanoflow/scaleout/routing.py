"""Where a request goes: to the replica that has seen most of its prompt, unless that one is much busier.

Busy is measured in tokens: prompt tokens that are not computed yet and output tokens that may still come.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow.core.sampling import SamplingParams

STRETCH = 8
"""A replica may be ahead of the idlest one by this many times the tokens that its cache saves on the request.

Each of the next requests with the same prefix saves as much again, so one request's savings would be too strict; a
prefix of one page (a chat template's opening) should hardly bind.
"""
EXPECTED_OUTPUT_TOKENS = 1024
"""Most output tokens that count for one choice: what `max_tokens` allows beyond is rarely used."""


def choose(loads: Mapping[int, int], matched: Mapping[int, int]) -> int:
    """The slot for a request.

    `loads` has the outstanding tokens of every slot that is ready (at least one), `matched` the prompt tokens that a
    slot has seen before; absent means none.
    """
    idlest = min(loads, key=lambda slot: (loads[slot], slot))
    best = max(loads, key=lambda slot: (matched.get(slot, 0), -loads[slot], -slot))
    saved = matched.get(best, 0) - matched.get(idlest, 0)
    return best if loads[best] - loads[idlest] <= STRETCH * saved else idlest


def expected_output_tokens(params: SamplingParams) -> int:
    """Output tokens that a request counts for, over all its choices."""
    return params.n * min(params.max_tokens or EXPECTED_OUTPUT_TOKENS, EXPECTED_OUTPUT_TOKENS)
