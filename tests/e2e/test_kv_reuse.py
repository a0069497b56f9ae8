"""Equal greedy tokens (float32) wherever a prompt's keys and values come from, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.engine.sequence import Sequence
from nanoflow.models.hf_config import read_hf_spec
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from tests.e2e.tiny_models import ARCHITECTURES, BACKENDS, VOCAB, make_tiny_engine, prompt_of, run, save_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [prompt_of(length, seed=length) for length in (40, 64, 75)]
SLOW = MachineRates("slow", "float32", flops_per_s=1.0, mem_bytes_per_s=1.0, measured=True)


@pytest.fixture(autouse=True)
def reloading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.engine.build.measure_rates", lambda *_: SLOW)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return folder


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Any]:
    """Makes engines with tiers in a folder of this test, and closes them."""
    made: list[Engine] = []

    def make(folder: Path, kernels: str = BACKENDS[0], **options: Any) -> Engine:
        tiers = {"kv_dram_bytes": 1 << 22, "kv_ssd_path": str(tmp_path / "store"), "kv_ssd_bytes": 1 << 24}
        made.append(make_tiny_engine(folder, kernels, max_model_len=128, **{**tiers, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def cold(folder: Path, kernels: str = BACKENDS[0], params: SamplingParams = GREEDY) -> list[list[int]]:
    engine = make_tiny_engine(folder, kernels, enable_prefix_caching=False)
    outputs = run(engine, PROMPTS, params)
    assert engine.core.stats().kv_hit_tokens == {"device": 0}
    engine.close()
    return outputs


def hits(engine: Engine) -> dict[str, int]:
    return {tier: tokens for tier, tokens in engine.core.stats().kv_hit_tokens.items() if tokens}


def forget_device(engine: Engine) -> None:
    engine.core.scheduler.pool.clear()


def forget_dram(engine: Engine) -> None:
    """Write everything to the SSD, then drop what is above it."""
    residency = engine.core.scheduler.residency
    while residency.has_writes:
        engine.core.step(None)
    assert residency.loader is not None
    dram = residency.loader.lower.dram
    keys = [key for key in list(engine.core.scheduler.pool._page_of) if dram.contains([key])[0]]
    assert dram.evict(keys) == len(keys) > 0
    forget_device(engine)


def test_device_dram_ssd_and_a_restart_give_the_tokens_of_a_cold_cache(tiny: Path, engines: Any) -> None:
    wanted = cold(tiny)
    engine = engines(tiny)
    assert run(engine, PROMPTS, GREEDY) == wanted
    assert hits(engine) == {}
    assert run(engine, PROMPTS, GREEDY) == wanted
    on_device = hits(engine)["device"]
    assert on_device >= 32 + 63 + 64
    forget_device(engine)
    assert run(engine, PROMPTS, GREEDY) == wanted
    from_dram = hits(engine)["dram"]
    assert from_dram >= 32 + 48 + 64
    forget_dram(engine)
    assert run(engine, PROMPTS, GREEDY) == wanted
    assert hits(engine)["ssd"] == from_dram
    engine.close()
    fresh = engines(tiny)
    assert run(fresh, PROMPTS, GREEDY) == wanted
    assert hits(fresh) == {"ssd": from_dram}


def test_swapped_requests_go_on_where_they_were(tiny: Path, engines: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=50)
    wanted = cold(tiny, params=params)
    page_bytes = 16 * read_hf_spec(tiny).kv_bytes_per_token("float32")
    engine = engines(tiny, kv_ssd_path=None, kv_ssd_bytes=None, kv_memory_bytes=16 * page_bytes)
    scheduler = engine.core.scheduler
    scheduler.lengths._sum = scheduler.lengths._count  # predicts answers of one token: admits all three
    scheduler.limits = replace(scheduler.limits, eos_ids=(VOCAB + 1,))  # may end at any token, as far as it knows
    assert run(engine, PROMPTS, params) == wanted
    assert scheduler.preemptions > 0
    assert hits(engine)["dram"] > 0
    assert engine.core.stats().work.recomputed_tokens <= 16 * scheduler.preemptions


@pytest.mark.parametrize("kernels", BACKENDS)
def test_choices_of_one_prompt(tiny_folder: Path, engines: Any, kernels: str) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8)
    outputs = []
    for caching in (False, True):
        tiers = {} if caching else {"kv_dram_bytes": None, "kv_ssd_path": None, "kv_ssd_bytes": None}
        engine = engines(tiny_folder, kernels, enable_prefix_caching=caching, **tiers)
        sequences = engine.submission.sequences(PROMPTS[0], params)
        drive(engine, sequences)
        outputs.append([sequence.output_ids for sequence in sequences])
        assert engine.core.stats().work.prompt_tokens == 40 + 2 * (1 if caching else 40)
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs[0]}) == 3


def test_copies_run_on_the_lane_that_the_pipeline_names(tiny_folder: Path, engines: Any, tmp_path: Path) -> None:
    wanted = cold(tiny_folder)
    plain = engines(tiny_folder).pipeline
    ops = (*plain.nano_ops, NanoOp(Op.KV_OFFLOAD, 0, plain.dense_batch, "copies"))
    lanes = (*plain.lanes, LaneSpec("copies", 0.5))
    path = tmp_path / "pipeline.json"
    Pipeline("with copies", plain.dense_batch, lanes, ops).save(path)
    engine = engines(tiny_folder, pipeline=str(path), kv_ssd_path=None, kv_ssd_bytes=None)
    for _ in range(3):
        assert run(engine, PROMPTS, GREEDY) == wanted
        forget_device(engine)
    assert hits(engine)["dram"] > 0


def test_a_changed_model_finds_nothing(tmp_path: Path, engines: Any) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, name in zip(folders, ("qwen2", "llama2-mha"), strict=True):
        save_tiny_model(name, folder)
    first = engines(folders[0])
    run(first, PROMPTS, GREEDY)
    first.close()
    weights = folders[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-200_000:-199_000] = bytes(1000)  # a fine-tuned model: same names, shapes and sizes
    weights.write_bytes(data)
    changed = engines(folders[0])
    assert run(changed, PROMPTS, GREEDY) == cold(folders[0])
    assert hits(changed) == {}


def drive(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.core.add(sequence)
    in_flight = None
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    save_tiny_model("qwen2", folder)
    return folder
