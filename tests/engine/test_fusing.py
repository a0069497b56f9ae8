"""Forms of contenders by all-reduces that norm as well: which are tried, which go on to verification, which may win."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.core.presets import PRESETS
from nanoflow.distributed.collectives import LibraryCollectives
from nanoflow.distributed.implementations import norming_on
from nanoflow.distributed.reduce_norm import one_shot_limit
from nanoflow.engine.fusing import MARGIN, TURNS, fused_forms, promising_forms
from nanoflow.engine.verification import Contender, IterationTime, verify
from nanoflow.pipeline.baselines import nano_batches, network_overlap, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline

BATCH, ROW_BYTES = 256, 2 * 4096
NAMES = ("two_shot_norm", "one_shot_norm")
GRAPH = layer_graph(PRESETS["llama-3-8b"], 2)


def by_library(pipeline: Pipeline, *overlaps: str) -> Pipeline:
    nano_ops = tuple(
        replace(nano, variant="library") if RESOURCE[nano.op] is Resource.NETWORK else nano
        for nano in pipeline.nano_ops
    )
    return replace(pipeline, nano_ops=nano_ops, meta={"overlaps": list(overlaps)})


def contenders(rows: int = BATCH) -> list[Contender]:
    return [
        Contender(by_library(network_overlap(GRAPH, rows, 0.1), "network"), 80.0),
        Contender(by_library(network_overlap(GRAPH, rows), "network"), 90.0),
        Contender(by_library(sequential(GRAPH, rows)), 100.0),
        Contender(by_library(nano_batches(GRAPH, rows, [rows // 2])), 110.0),
    ]


def forms(rows: int = BATCH) -> list[Contender]:
    return fused_forms(contenders(rows), NAMES, 2, ROW_BYTES)


def test_the_sequential_pipeline_and_the_best_overlap_of_the_network_have_forms() -> None:
    found = forms()
    assert [(one.form_of, one.name) for one in found] == [
        ("sequential", "sequential-two_shot_norm"),
        ("network-overlap-0.10", "network-overlap-0.10-two_shot_norm"),
        ("sequential", "sequential-one_shot_norm"),
        ("network-overlap-0.10", "network-overlap-0.10-one_shot_norm"),
    ]
    bases = {one.name: one for one in contenders()}
    for form in found:
        base = bases[form.form_of]
        form.pipeline.validate(GRAPH)
        assert form.predicted_us == base.predicted_us
        assert form.collectives == [form.name.rsplit("-", 1)[1]]
        changed = {n.op for n, was in zip(form.pipeline.nano_ops, base.pipeline.nano_ops, strict=True) if n != was}
        assert changed == {Op.O_REDUCE, Op.FFN_REDUCE}


def test_messages_too_long_for_one_shot_have_the_other_form_only() -> None:
    assert one_shot_limit(2) == 8 << 20 > one_shot_limit(3)
    rows = one_shot_limit(2) // ROW_BYTES
    assert {one.name.rsplit("-", 1)[1] for one in forms(rows)} == set(NAMES)
    longer = [one.name for one in forms(2 * rows)]
    assert "sequential-one_shot_norm" not in longer
    assert "network-overlap-0.10-one_shot_norm" in longer, "its halves are short enough"
    assert not any(one.name.endswith("one_shot_norm") for one in forms(4 * rows))
    assert fused_forms(contenders(), NAMES, 2, 24) == [], "rows of odd sizes"
    assert fused_forms(contenders(), (), 2, ROW_BYTES) == []


def times(factors: dict[str, float]) -> dict[str, float]:
    return {one.name: factors.get(one.name, 1.0) for one in (*contenders(), *forms())}


def promising(factors: dict[str, float], seconds: float = 60.0) -> tuple[list[str], list[str]]:
    """Names of the promising forms, and of all that was run."""
    ran: list[str] = []
    of_name = times(factors)

    def measure(one: Contender) -> IterationTime:
        ran.append(one.name)
        return IterationTime(1000 * of_name[one.name], 1.0)

    return [one.name for one in promising_forms(contenders(), forms(), measure, seconds)], ran


def test_the_best_form_of_each_goes_on_unless_it_is_clearly_slower() -> None:
    found, ran = promising({"sequential-one_shot_norm": 0.98, "network-overlap-0.10-two_shot_norm": 1 + MARGIN / 2,
                            "network-overlap-0.10-one_shot_norm": 1.2})  # fmt: skip
    assert found == ["network-overlap-0.10-two_shot_norm", "sequential-one_shot_norm"]
    assert len(ran) == 6 * TURNS and len(set(ran)) == 6, "each in turn with what it is a form of"
    assert promising({one.name: 1 + 2 * MARGIN for one in forms()})[0] == []


def test_forms_are_left_out_when_time_is_short_and_the_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert promising({}, seconds=-1.0) == ([], ["network-overlap-0.10", "sequential"] * TURNS)
    assert "no time to try sequential-two_shot_norm" in caplog.text

    def slowly(one: Contender) -> IterationTime:
        time.sleep(0.02)
        return IterationTime(1.0, 1.0)

    some = promising_forms(contenders(), forms(), slowly, 0.05)
    assert [one.name for one in some] == ["sequential-two_shot_norm"], "the first ones were tried"


@pytest.mark.parametrize(("factor", "winner"), [(0.9, "sequential-two_shot_norm"), (1.0, "sequential")])
def test_a_form_wins_by_the_rule_for_all(factor: float, winner: str) -> None:
    factors = times({"sequential-two_shot_norm": factor})
    everything = [*contenders(), forms()[0]]
    verdict = verify(everything, lambda one: IterationTime(1000 * factors[one.name], 50 * factors[one.name]), rounds=3)
    assert verdict.pipeline.name == winner
    told = {one["name"]: one for one in verdict.to_dict()["candidates"]}
    assert told["sequential-two_shot_norm"]["form_of"] == "sequential"
    assert told["sequential-two_shot_norm"]["saved_layer_us"] == pytest.approx(50 * (1 - factor))
    assert "saved_layer_us" not in told["sequential"]


def test_gpus_without_symmetric_memory_have_no_forms() -> None:
    library = LibraryCollectives.__new__(LibraryCollectives)
    assert norming_on(torch.device("cuda"), library) == ()
    assert norming_on(torch.device("cpu"), library) == ("two_shot_norm",)
    library.name = "two_shot"
    assert norming_on(torch.device("cuda"), library) == NAMES
