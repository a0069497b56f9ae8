"""Routing, prefix memory, replay and resources, each alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from nanoflow.cli.options import flag
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.request import Logprob, OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, TierFill, WorkDone
from nanoflow.scaleout.affinity import PrefixMap
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.replay import DivergedError, Replay
from nanoflow.scaleout.resources import Share, of_one_replica, share_of
from nanoflow.scaleout.routing import STRETCH, choose, expected_output_tokens
from nanoflow.scaleout.totals import summed


def test_without_a_common_prefix_the_idlest_is_chosen() -> None:
    assert choose({0: 500, 1: 20, 2: 300}, {}) == 1
    assert choose({0: 7, 1: 7}, {}) == 0


def test_a_prefix_binds_until_its_holder_is_much_busier() -> None:
    assert choose({0: 100 * STRETCH, 1: 0}, {0: 100}) == 0
    assert choose({0: 100 * STRETCH + 1, 1: 0}, {0: 100}) == 1
    assert choose({0: 400, 1: 0}, {0: 128, 1: 112}) == 1, "only what the idlest one lacks is saved"
    assert choose({0: 50, 1: 10, 2: 0}, {0: 64, 1: 64}) == 1, "the idler of two holders"
    assert choose({1: 10}, {0: 64}) == 1, "the holder is not ready"


def test_long_answers_count_for_what_is_usual() -> None:
    assert expected_output_tokens(SamplingParams(n=3, max_tokens=5)) == 15
    assert expected_output_tokens(SamplingParams(max_tokens=100_000)) == expected_output_tokens(
        SamplingParams(max_tokens=None)
    )


def test_prefixes_are_matched_by_whole_pages_and_salt() -> None:
    prefixes = PrefixMap(16, 1000)
    prompt = list(range(100))
    prefixes.note(prefixes.names(prompt, None), 0)
    prefixes.note(prefixes.names([*range(40), *[7] * 60], None), 1)
    assert len(prefixes.names(list(range(96)), None)) == 5, "the last token is always computed"
    assert prefixes.matched_tokens(prefixes.names(prompt, None)) == {0: 96, 1: 32}
    assert prefixes.matched_tokens(prefixes.names(prompt[:50], None)) == {0: 48, 1: 32}
    assert prefixes.matched_tokens(prefixes.names(prompt, "another tenant")) == {}
    assert prefixes.matched_tokens(prefixes.names(prompt[:10], None)) == {}
    prefixes.forget(0)
    assert prefixes.matched_tokens(prefixes.names(prompt, None)) == {1: 32}


def test_the_least_recently_used_pages_are_forgotten_ends_first() -> None:
    prefixes = PrefixMap(16, 6)
    first, second = prefixes.names(list(range(65)), None), prefixes.names([*[1] * 65], None)
    prefixes.note(first, 0)
    prefixes.note(second, 1)
    assert len(prefixes) == 6
    assert prefixes.matched_tokens(second) == {1: 64}
    assert prefixes.matched_tokens(first) == {0: 32}


def test_a_second_answer_goes_on_where_the_first_ended() -> None:
    replay = Replay(2)
    first = replay.fresh(OutputDelta("r", 0, "ab", [1, 2], [{1: Logprob(-1.0)}, {2: Logprob(-1.0)}], cached_tokens=3))
    assert first is not None and first.cached_tokens == 3
    replay.fresh(OutputDelta("r", 1, "x", [9], finish_reason="length"))
    replay.restart()
    assert replay.open == [0]
    assert replay.fresh(OutputDelta("r", 0, "a", [1], [{1: Logprob(-1.0)}], cached_tokens=0)) is None
    assert replay.fresh(OutputDelta("r", 1, "x", [9], finish_reason="length")) is None
    logprobs = [{2: Logprob(-1.0)}, {3: Logprob(-2.0)}]
    fresh = replay.fresh(OutputDelta("r", 0, "bc", [2, 3], logprobs, finish_reason="stop"))
    assert fresh == OutputDelta("r", 0, "c", [3], [{3: Logprob(-2.0)}], finish_reason="stop")
    assert replay.n_open == 0


@pytest.mark.parametrize(
    "again",
    [
        OutputDelta("r", 0, "aB", [1, 5]),
        OutputDelta("r", 0, "aB", [1, 2]),
        OutputDelta("r", 0, "a", [1], finish_reason="stop"),
    ],
    ids=["another token", "another text", "a shorter answer"],
)
def test_another_answer_is_refused(again: OutputDelta) -> None:
    replay = Replay(1)
    replay.fresh(OutputDelta("r", 0, "ab", [1, 2]))
    replay.restart()
    with pytest.raises(DivergedError):
        replay.fresh(again)


def test_an_error_of_the_second_replica_ends_the_choice() -> None:
    replay = Replay(1)
    replay.fresh(OutputDelta("r", 0, "ab", [1, 2]))
    replay.restart()
    ended = replay.fresh(OutputDelta("r", 0, finish_reason="error", error="no memory"))
    assert ended is not None and ended.error == "no memory" and replay.n_open == 0


def test_counters_outlive_replicas_and_gauges_do_not() -> None:
    def stats(n: int) -> EngineStats:
        tier = TierFill("dram", n, 10 * n, read_bytes=100 * n)
        return EngineStats(
            n_running=n, preemptions=n, finished={"stop": n}, work=WorkDone(output_tokens=n), kv_tiers=(tier,)
        )

    total = summed([stats(1), stats(2)], [stats(4)])
    assert (total.n_running, total.preemptions, total.finished, total.work.output_tokens) == (3, 7, {"stop": 7}, 7)
    assert total.kv_tiers == (TierFill("dram", 3, 30, read_bytes=700),)
    assert total.energy_j is None


def test_what_a_replica_takes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.core.env.available_cores", lambda: 8)
    config = EngineConfig.from_options(model="smollm2")
    four = ScaleoutConfig(replicas=4)
    assert share_of(config, four, has_gpus=False) == Share(2)
    assert share_of(config, ScaleoutConfig(replica_cpus=3, replica_gpus=0.5), has_gpus=True) == Share(3, 0.5)
    assert share_of(config, four, has_gpus=True) == Share(1, 1.0)
    threaded = config.with_options("device", threads=3)
    assert share_of(threaded, four, has_gpus=False) == Share(3)
    one = of_one_replica(config, Share(2), four)
    assert (one.device.threads, one.cache.kv_memory_fraction) == (2, 0.1)
    assert of_one_replica(config, Share(1, 1.0), four) == config
    assert (Share(2).fits(7, 0), Share(1, 0.5).fits(16, 2), Share(4, 1.0).fits(9, 8)) == (3, 4, 2)


def test_a_replica_of_several_ranks_takes_a_gpu_a_rank() -> None:
    config = EngineConfig.from_options(model="smollm2", tensor_parallel_size=2)
    assert share_of(config, ScaleoutConfig(replicas=2), has_gpus=True) == Share(2, 2.0)
    assert of_one_replica(config, Share(4), ScaleoutConfig(replicas=2)).device.threads == 4, "all ranks together"
    threaded = config.with_options("device", threads=1)
    assert share_of(threaded, ScaleoutConfig(replicas=2), has_gpus=False) == Share(2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"replicas": 0}, "replicas"),
        ({"ray": ""}, "ray"),
        ({"replica_cpus": 0}, "replica_cpus"),
        ({"replica_gpus": -1.0}, "replica_gpus"),
        ({"health_timeout_s": 0.0}, "health_timeout_s"),
        ({"max_restarts": -1}, "max_restarts"),
    ],
)
def test_options_that_cannot_work(options: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ScaleoutConfig(**options)  # type: ignore[arg-type]


def test_every_option_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    missing = [item.name for item in fields(ScaleoutConfig) if f"| `{flag(item.name)} " not in page]
    assert not missing
