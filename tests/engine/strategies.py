"""What hypothesis makes up for a scheduler over a `HashModel`: requests, and engines of every shape to run them on."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nanoflow.engine.scheduler import SchedulerLimits
from tests.engine.hash_model import EOS

VOCAB = 23

PROMPTS = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=40)
ANSWERS = st.integers(1, 30)
"""Longest answers, in tokens."""

SHAPES = st.fixed_dictionaries(
    {
        "dense_batch": st.integers(1, 40),
        "max_running": st.integers(1, 16),
        "page_tokens": st.sampled_from([1, 4, 16]),
        "spare_pages": st.integers(0, 12),
    }
)
"""Of an engine; see `limits_for`."""


def limits_for(shape: dict[str, int], longest: int, **more: Any) -> SchedulerLimits:
    """Of an engine with one of `SHAPES` that just holds a request of `longest` tokens, and some spare pages."""
    page_tokens = shape["page_tokens"]
    return SchedulerLimits(
        dense_batch=shape["dense_batch"],
        max_running=min(shape["max_running"], shape["dense_batch"]),
        max_model_len=longest,
        page_tokens=page_tokens,
        n_pages=-(-longest // page_tokens) + shape["spare_pages"],
        eos_ids=(EOS,),
        **more,
    )
