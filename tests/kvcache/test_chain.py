"""Page names: equal for equal histories, different for everything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.kvcache.chain import begin, page_keys, root_key, salted_root, tail_key
from nanoflow.kvcache.tier import KEY_BYTES

ROOT = root_key("model", "revision")
tokens_strategy = st.lists(st.integers(0, 3), max_size=24)


def keys_of(tokens: list[int], page_tokens: int, root: bytes = ROOT) -> list[bytes]:
    return page_keys(begin(root), np.array(tokens, dtype=np.int32), page_tokens)


@settings(max_examples=200, deadline=None)
@given(first=tokens_strategy, second=tokens_strategy, page_tokens=st.sampled_from([1, 2, 4]))
def test_names_are_equal_exactly_where_all_tokens_up_to_there_are(
    first: list[int], second: list[int], page_tokens: int
) -> None:
    ours, theirs = keys_of(first, page_tokens), keys_of(second, page_tokens)
    assert len(ours) == len(first) // page_tokens and all(len(key) == KEY_BYTES for key in ours)
    for i, key in enumerate(ours):
        for j, other in enumerate(theirs):
            same = i == j and first[: (i + 1) * page_tokens] == second[: (j + 1) * page_tokens]
            assert (key == other) == same


def test_a_chain_can_be_continued() -> None:
    tokens = np.arange(100, 148, dtype=np.int32)
    history = begin(ROOT)
    parts = [*page_keys(history, tokens[:16], 16), *page_keys(history, tokens[16:], 16)]
    assert parts == keys_of(tokens.tolist(), 16)


@pytest.mark.parametrize(
    "other",
    [
        root_key("model", "other revision"),
        root_key("mode", "lrevision"),
        root_key("model", "revision", ""),
        salted_root(ROOT, "tenant"),
        salted_root(ROOT, ""),
    ],
)
def test_another_root_shares_no_name(other: bytes) -> None:
    tokens = [1, 2, 3, 4] * 8
    assert not set(keys_of(tokens, 4)) & set(keys_of(tokens, 4, other))


def test_salts_are_told_apart() -> None:
    assert salted_root(ROOT, None) == ROOT
    salts = ["a", "b", "ab", "A", "ä", "a\0", "\ud800"]
    assert len({salted_root(ROOT, salt) for salt in salts}) == len(salts)


def test_a_tail_is_never_a_full_page() -> None:
    tokens = np.arange(4, dtype=np.int32)
    first = page_keys(begin(ROOT), tokens, 4)[0]
    names = [tail_key(parent, tokens[:count]) for parent in (ROOT, first) for count in range(1, 5)]
    assert len({first, *names}) == 9
