"""Synthetic batches are what serving the workload would hold; tasks cover the sizes and splits they promise."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op
from nanoflow.device.cpu import CpuDevice
from nanoflow.profiling.synthetic import make_plan, pages_for, steady_mix
from nanoflow.profiling.tasks import Settings, network_splits, network_tasks, pair_tasks, solo_tasks


def test_the_steady_mix_follows_the_workload() -> None:
    mix = steady_mix("512/512", 512, max_running=512, max_context=8192)
    assert (mix.n_decode, mix.n_prefill) == (256, 256)
    assert mix.context == pytest.approx(512 + 256, abs=1)
    assert (mix.chunk, mix.before) == (256, 128)
    longer = steady_mix("512/1024", 512, max_running=512, max_context=8192)
    assert longer.n_decode == pytest.approx(512 * 2 / 3, abs=1)
    capped = steady_mix("512/512", 512, max_running=100, max_context=300)
    assert (capped.n_decode, capped.context) == (100, 300)
    assert capped.chunk + capped.before <= 300
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        steady_mix("512/512", 1, 8, 8192)
    with pytest.raises(ConfigError, match="not known"):
        steady_mix("nonsense", 512, 8, 8192)


def test_chunks_fill_the_prefill_tokens() -> None:
    mix = steady_mix("100/100", 512, max_running=256, max_context=8192)
    assert sum(count for count, _ in mix.chunks(mix.n_prefill)) == mix.n_prefill == 256
    assert [count for count, _ in mix.chunks(250)] == [100, 100, 50]


def test_a_plan_gives_each_request_pages_of_its_own_and_each_token_its_place() -> None:
    chunks = [(20, 12), (5, 12)]
    n_pages = pages_for(3, 40, chunks, 16)
    assert n_pages == 3 * 3 + 2 + 2
    plan = make_plan(3, 40, chunks, n_pages, 16)
    assert (plan.n_tokens, plan.n_decode, plan.n_requests) == (28, 3, 5)
    assert plan.context_len.tolist() == [40, 40, 40, 32, 17]
    held = [plan.page_table[r, : -(-int(plan.context_len[r]) // 16)] for r in range(5)]
    assert sorted(np.concatenate(held).tolist()) == list(range(n_pages)), "no page is shared"
    assert plan.positions.tolist() == [39, 39, 39, *range(12, 32), *range(12, 17)]
    assert len(set(plan.kv_slots.tolist())) == plan.n_tokens
    request = np.repeat(np.arange(5), np.diff(plan.query_start))
    for token, slot in enumerate(plan.kv_slots.tolist()):
        position = int(plan.positions[token])
        assert slot == plan.page_table[request[token], position // 16] * 16 + position % 16
    assert plan.sampling.token_rows.tolist() == [0, 1, 2]


def test_other_seeds_take_other_pages() -> None:
    one, two = (make_plan(4, 64, [], 64, 16, seed) for seed in (0, 1))
    assert set(one.page_table.ravel().tolist()) != set(two.page_table.ravel().tolist())


def test_sizes_are_multiples_of_the_step_with_the_largest_and_small_slices() -> None:
    assert Settings(64, 200).sizes == [16, 32, 64, 128, 192, 200]
    assert Settings(128, 128).sizes == [32, 64, 128]
    assert len(Settings(64, 6400, quick=True).sizes) == 2 + 6
    assert Settings(1, 2).sizes == [1, 2]
    with pytest.raises(ConfigError, match="raise the latter"):
        Settings(64, 32)


def test_pairs_split_the_whole_device_between_different_resources() -> None:
    mix = steady_mix("512/512", 512, 256, 8192)
    shares = (0.25, 0.5, 0.75, 1.0)
    ops = (Op.QKV, Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION, Op.O, Op.GATE_UP, Op.DOWN, Op.KV_OFFLOAD, Op.KV_RELOAD)
    tasks = pair_tasks("k", ops, shares, mix, Settings(64, 512))
    assert {task.share for task in tasks} == {0.25, 0.5, 0.75}
    kinds = {(task.first[0], task.second[0]) for task in tasks}
    gemms = {Op.QKV, Op.O, Op.GATE_UP, Op.DOWN}
    assert {(g, Op.DECODE_ATTENTION) for g in gemms} <= kinds
    assert {(g, copy) for g in gemms for copy in (Op.KV_OFFLOAD, Op.KV_RELOAD)} <= kinds
    assert (Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION) in kinds
    assert not any(second is Op.ALL_REDUCE for _, second in kinds)
    assert pair_tasks("k", ops, (1.0,), mix, Settings(64, 512)) == []
    assert len({task.key for task in (*tasks, *solo_tasks("k", ops, shares, Settings(64, 512)))}) == len(tasks) + (
        len(ops) * len(Settings(64, 512).sizes) * len(shares)
    )


def test_collectives_run_beside_products_and_attention_by_every_implementation() -> None:
    mix = steady_mix("512/512", 512, 256, 8192)
    ops = (Op.QKV, Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION, Op.O, Op.GATE_UP, Op.ALL_REDUCE, Op.REDUCE_SCATTER)
    variants = {Op.ALL_REDUCE: ("library", "two_shot"), Op.REDUCE_SCATTER: ("library",)}
    splits = network_splits("cuda", tuple(n / 132 for n in (12, 24, 48, 84, 108, 120, 132)))
    assert splits == [(1 - n / 132, n / 132) for n in (12, 24, 48)] + [(1.0, 1.0)]
    tasks = network_tasks("k", ops, splits, mix, Settings(64, 512), variants)
    kinds = {(task.first[0], task.second[0], task.variant) for task in tasks}
    firsts = (Op.QKV, Op.O, Op.GATE_UP, Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)
    assert kinds == {(op, Op.ALL_REDUCE, name) for op in firsts for name in ("library", "two_shot")}
    assert len({task.key for task in tasks}) == len(tasks) == len(kinds) * len(splits)
    quick = network_tasks("k", ops, splits, mix, Settings(64, 512, quick=True), variants)
    assert {task.first[0] for task in quick} == {Op.GATE_UP, Op.DECODE_ATTENTION}
    solo = solo_tasks("k", ops, (0.5, 1.0), Settings(64, 512, quick=True), variants)
    assert {(task.op, task.implementation) for task in solo} >= {(Op.QKV, "k"), (Op.ALL_REDUCE, "two_shot")}
    assert {task.share for task in solo} == {1.0}
    assert [task.tokens for task in solo if task.op is Op.REDUCE_SCATTER] == [512], "no pipeline runs it as it is"


def test_collectives_of_a_cpu_take_no_thread() -> None:
    ((products, wire),) = network_splits("cpu", (1.0,))
    assert products + wire == 1.0
    assert max(1, round(products * 1)) == max(1, round(wire * 1)) == 1, "one thread each, of which one waits"
    assert round(products * 4) == 4


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_a_cpu_offers_whole_threads_as_shares(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.device.cpu.env.available_cores", lambda: threads)
    shares = CpuDevice().shares()
    assert shares == tuple(n / threads for n in range(1, threads + 1))


def test_many_threads_offer_few_shares_each_with_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.device.cpu.env.available_cores", lambda: 96)
    shares = CpuDevice().shares()
    assert 8 <= len(shares) <= 24
    assert shares[-1] == 1.0
    assert all(any(abs(1 - share - other) < 1e-9 for other in shares) for share in shares[:-1])
