"""KV pages below the device on two GPUs of one host: wherever they come from, greedy tokens are those of one GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.core.sampling import SamplingParams
from nanoflow.models.hf_config import read_hf_spec
from tests.distributed.test_kv_tiers import IN_FULL_PAGES, PROMPTS, SLOW, expect_short_answers, forget_dram, hits
from tests.e2e.tiny_models import make_tiny_engine, run, save_tiny_model

pytestmark = pytest.mark.multi_gpu

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = replace(GREEDY, max_tokens=50)


def test_every_tier_a_swap_and_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_PRODUCTS", "library")
    monkeypatch.setattr("nanoflow.engine.build.measure_rates", lambda *_: SLOW)
    save_tiny_model("llama2-mha", tmp_path)
    page_bytes = 16 * read_hf_spec(tmp_path).kv_bytes_per_token("float32")
    plain = {"device": "cuda", "max_running": 8, "max_model_len": 128, "kv_memory_bytes": 1 << 20}
    one = make_tiny_engine(tmp_path, "triton", **plain, enable_prefix_caching=False)
    wanted, swapped = run(one, PROMPTS, GREEDY), run(one, PROMPTS, LONG)
    one.close()
    tiers = {"kv_dram_bytes": 1 << 22, "kv_ssd_path": str(tmp_path / "store"), "kv_ssd_bytes": 1 << 24}
    options = {**plain, **tiers, "tensor_parallel_size": 2, "kv_memory_bytes": 8 * page_bytes}  # 16 pages on each
    two = make_tiny_engine(tmp_path, "triton", **options)
    assert two.core.scheduler.pool.n_pages == 16
    assert run(two, PROMPTS, GREEDY) == wanted
    two.core.scheduler.pool.clear()
    assert run(two, PROMPTS, GREEDY) == wanted
    assert hits(two)["dram"] >= IN_FULL_PAGES
    forget_dram(two)
    assert run(two, PROMPTS, GREEDY) == wanted
    assert hits(two)["ssd"] >= IN_FULL_PAGES
    expect_short_answers(two)
    assert run(two, PROMPTS, LONG) == swapped
    assert two.core.scheduler.preemptions > 0
    dram = two.core.stats().kv_tiers[0]
    assert dram.read_s > 0 and dram.write_s > 0
    two.close()
    fresh = make_tiny_engine(tmp_path, "triton", **options)
    assert run(fresh, PROMPTS, GREEDY) == wanted
    assert hits(fresh)["ssd"] >= IN_FULL_PAGES
    fresh.close()
