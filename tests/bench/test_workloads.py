"""Requests have the lengths, arrivals and shared prefixes that were asked for; traces are read as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanoflow.bench.arrivals import Arrivals
from nanoflow.bench.traces import BLOCK_TOKENS, read_conversations, read_requests
from nanoflow.bench.workloads import Limits, make_requests
from nanoflow.core.errors import ConfigError

# Mean and deviation of prompts and answers as NanoFlow's authors publish them.
PUBLISHED = {
    "splitwise": (1155, 1109, 211, 163),
    "lmsys-chat": (102, 169, 222, 210),
    "sharegpt": (246, 547, 322, 244),
    "512/512": (512, 0, 512, 0),
    "300~200/50": (300, 200, 50, 0),
}
TRACE = "arrival_ms,input_len,output_len,hash_ids,other\n0,1000,10,0-1,x\n500,1100,20,0-1 7,y\n4000,30,3,9,z\n"
TURNS = "conv_id,turn,history_len,new_input_len,output_len\na,0,0,5,7\na,1,12,3,4\nb,0,0,2,2\n"


@pytest.mark.parametrize("workload", sorted(PUBLISHED))
@pytest.mark.parametrize("seed", [0, 3, 19])
def test_statistics_are_the_published_ones(workload: str, seed: int) -> None:
    requests = make_requests(workload, 10_000, seed=seed)
    info = requests.info
    found = (
        info.prompt_mean_tokens,
        info.prompt_deviation_tokens,
        info.output_mean_tokens,
        info.output_deviation_tokens,
    )
    assert found == pytest.approx(PUBLISHED[workload], rel=0.05)
    assert (requests.prompt_tokens.mean(), requests.output_tokens.std()) == (found[0], found[3])


def test_filters_leave_out_and_fill_up() -> None:
    requests = make_requests("sharegpt", 2000, limits=Limits(total_tokens=600, output_tokens=400))
    assert len(requests) == 2000
    assert (requests.prompt_tokens + requests.output_tokens).max() <= 600
    assert requests.output_tokens.max() <= 400
    assert requests.info.max_total_tokens == 600
    with pytest.raises(ConfigError, match="within the limits"):
        make_requests("512/512", 10, limits=Limits(prompt_tokens=100))


@pytest.mark.parametrize(("kind", "burstiness"), [("poisson", 1.0), ("gamma", 4.0), ("gamma", 0.25)])
def test_random_arrivals_have_the_rate_and_the_burstiness(kind: str, burstiness: float) -> None:
    arrivals = Arrivals(kind, 5.0, burstiness)
    gaps = np.diff(arrivals.times(10_000, 1))
    assert (gaps >= 0).all()
    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.1)
    assert np.array_equal(arrivals.times(50, 1), arrivals.times(50, 1))
    assert not np.array_equal(arrivals.times(50, 1), arrivals.times(50, 2))


def test_a_trace_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text(TRACE)
    trace = read_requests(path)
    assert trace.prompt_tokens.tolist() == [1000, 1100, 30]
    assert trace.output_tokens.tolist() == [10, 20, 3]
    assert trace.arrival_s is not None and trace.arrival_s.tolist() == [0.0, 0.5, 4.0]
    assert trace.blocks == ((0, 1), (0, 1, 7), (9,))


def test_trace_arrivals_keep_order_and_gaps_or_take_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text(TRACE)
    requests = make_requests(str(path), 3, seed=5, arrivals=Arrivals("trace"))
    assert requests.prompt_tokens.tolist() == [1000, 1100, 30]
    assert requests.arrival_s.tolist() == [0.0, 0.5, 4.0]
    faster = make_requests(str(path), 3, arrivals=Arrivals("trace", rate_rps=2.0))
    assert faster.arrival_s.tolist() == [0.0, 0.125, 1.0]
    with pytest.raises(ConfigError, match="3 arrivals, 4 are wanted"):
        make_requests(str(path), 4, arrivals=Arrivals("trace"))
    with pytest.raises(ConfigError, match="records no arrivals"):
        make_requests("512/512", 4, arrivals=Arrivals("trace"))


def test_prompts_share_exactly_their_common_blocks(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text(TRACE)
    requests = make_requests(str(path), 3, arrivals=Arrivals("trace"))
    first, second, third = (requests.prompt(index, 32_000, seed=1) for index in range(3))
    assert [len(prompt) for prompt in (first, second, third)] == [1000, 1100, 30]
    assert first == second[:1000]
    assert len(first) < 2 * BLOCK_TOKENS < len(second)
    assert third != first[:30]
    assert requests.prompt(0, 32_000, seed=2) != first


def test_prompts_without_blocks_share_nothing_and_repeat_by_seed() -> None:
    requests = make_requests("64/8", 3)
    prompts = [requests.prompt(index, 1000, seed=4) for index in range(3)]
    assert len({prompt[0] for prompt in prompts} | {prompt[1] for prompt in prompts}) > 3
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    assert prompts[1] == requests.prompt(1, 1000, seed=4) != requests.prompt(1, 1000, seed=5)


def test_conversations_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "turns.csv"
    path.write_text(TURNS)
    first, second = read_conversations(path)
    assert [turn.prompt_tokens for turn in first.turns] == [5, 15]
    assert [turn.total_tokens for turn in first.turns] == [12, 19]
    assert (second.conv_id, len(second.turns)) == ("b", 1)
    with pytest.raises(ConfigError, match="bench multiround"):
        make_requests(str(path), 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input_len\n5\n", "lacks the column output_len"),
        ("input_len,output_len\n", "holds no row"),
        ("input_len,output_len\n5,0\n", "line 2: '0' is no length"),
        ("input_len,output_len,hash_ids\n5,1,3-x\n", "no block ids"),
        ("input_len,output_len,arrival_s\n5,1,soon\n", "is no time"),
    ],
)
def test_wrong_traces_are_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "load.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_requests(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("weekly",), "must be one of"),
        (("poisson",), "need a rate"),
        (("poisson", 0.0), "above 0"),
        (("gamma", 1.0, 0.0), "burstiness"),
    ],
)
def test_impossible_arrivals_are_refused(values: tuple[object, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Arrivals(*values)  # type: ignore[arg-type]
