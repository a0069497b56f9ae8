"""Pipelines as data: JSON both ways, what validation refuses, and the dependencies that follow from the op graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op
from nanoflow.core.presets import PRESETS
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from nanoflow.pipeline.small_batches import filled, small_batch_pipeline

DENSE = layer_graph(PRESETS["smollm2"])
MOE = layer_graph(PRESETS["mixtral-8x7b"])
LANES = (LaneSpec("a", 0.5), LaneSpec("b", 0.25))


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """A valid pipeline of the dense layer: each op cut its own way, ops in topological order, lanes at random."""
    dense_batch = draw(st.integers(1, 2000))
    nano_ops: list[NanoOp] = []
    for op in DENSE.ops:
        inner = draw(st.sets(st.integers(1, dense_batch - 1), max_size=4)) if dense_batch > 1 else set()
        edges = [0, *sorted(inner), dense_batch]
        pieces = list(zip(edges, edges[1:], strict=False))
        for start, stop in draw(st.permutations(pieces)):
            nano_ops.append(NanoOp(op, start, stop, draw(st.sampled_from("ab")), draw(st.sampled_from(["", "x"]))))
    meta = draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
    minimum = draw(st.integers(0, dense_batch))
    return Pipeline(draw(st.text(max_size=10)), dense_batch, LANES, tuple(nano_ops), meta, minimum)


@settings(max_examples=80, deadline=None)
@given(pipelines())
def test_json_gives_back_the_same_valid_pipeline(pipeline: Pipeline) -> None:
    pipeline.validate(DENSE)
    again = Pipeline.from_json(pipeline.to_json())
    assert again == pipeline
    assert again.meta == pipeline.meta
    assert again.slices == tuple(sorted({(n.start, n.stop) for n in pipeline.nano_ops}))


def test_files_without_min_tokens_cut_every_batch() -> None:
    pipeline = nano_batches(DENSE, 12, [4])
    text = json.loads(pipeline.to_json())
    assert text.pop("min_tokens") == 0
    assert Pipeline.from_json(json.dumps(text)) == pipeline != replace(pipeline, min_tokens=5)
    for wrong in (-1, 13):
        with pytest.raises(PipelineError, match="min_tokens must be 0 to dense_batch"):
            replace(pipeline, min_tokens=wrong).validate(DENSE)
    with pytest.raises(PipelineError, match="whole numbers"):
        Pipeline.from_json(json.dumps(text | {"min_tokens": 2.5}))


def test_small_batches_run_the_sequential_order_in_a_form_that_is_there() -> None:
    assert small_batch_pipeline(replace(nano_batches(DENSE, 12, [4]), min_tokens=1), DENSE) is None
    small = small_batch_pipeline(replace(nano_batches(DENSE, 12, [4]), min_tokens=5), DENSE)
    assert small == sequential(DENSE, 12)
    ranked = layer_graph(PRESETS["smollm2"], 2)
    for form in (0, 1):
        one_form = replace(sequential(ranked, 12, form), min_tokens=5)
        small = small_batch_pipeline(one_form, ranked)
        assert small is not None and {nano.op for nano in small.nano_ops} == {nano.op for nano in one_form.nano_ops}
        small.validate(ranked)


def test_a_partly_filled_batch_is_a_pipeline_of_its_size() -> None:
    pipeline = replace(nano_batches(DENSE, 12, [4]), min_tokens=5)
    smaller = filled(pipeline, 7)
    assert smaller is not None and smaller.slices == ((0, 2), (2, 7)) and smaller.min_tokens == 0
    smaller.validate(DENSE)
    assert filled(pipeline, 2) is None, "nobody would work on row 0 to 0"


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_dependencies_hold_row_by_row(pipeline: Pipeline) -> None:
    """What each row reads, spelled out a row at a time for a few rows, is among the dependencies, and nothing more."""
    found = pipeline.dependencies(DENSE)
    for index, nano in enumerate(pipeline.nano_ops):
        needed: set[tuple[int, int]] = set()
        for edge in DENSE.edges:
            if edge.consumer != nano.op:
                continue
            attention = edge.producer == Op.QKV
            for other, producer in enumerate(pipeline.nano_ops):
                if producer.op != edge.producer:
                    continue
                first = 0 if attention else nano.start
                if any(producer.start <= row < producer.stop for row in range(first, nano.stop)):
                    needed.add((other, int(edge.next_layer)))
        assert {(dep.producer, dep.layer_back) for dep in found[index]} == needed


def test_attention_waits_for_the_keys_of_all_earlier_rows() -> None:
    pipeline = nano_batches(DENSE, 12, [4, 8])
    index_of = {(n.op, n.start): i for i, n in enumerate(pipeline.nano_ops)}
    needs = pipeline.dependencies(DENSE)
    for start, producers in ((0, [0]), (4, [0, 4]), (8, [0, 4, 8])):
        for op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION):
            found = {dep.producer for dep in needs[index_of[op, start]]}
            assert found == {index_of[Op.QKV, producer] for producer in producers}


def test_the_next_layer_waits_for_its_own_rows_only() -> None:
    pipeline = nano_batches(DENSE, 12, [4])
    needs = pipeline.dependencies(DENSE)
    for index, nano in enumerate(pipeline.nano_ops):
        backward = [dep for dep in needs[index] if dep.layer_back]
        assert bool(backward) == (nano.op == Op.QKV)
        for dep in backward:
            producer = pipeline.nano_ops[dep.producer]
            assert (producer.op, producer.start, producer.stop) == (Op.DOWN, nano.start, nano.stop)


def test_graph_of_experts_ends_with_them() -> None:
    assert Op.EXPERTS in MOE.ops
    assert not {Op.GATE_UP, Op.DOWN} & set(MOE.ops)
    sequential(MOE, 8).validate(MOE)
    with pytest.raises(PipelineError, match="not part of this model's layer"):
        sequential(MOE, 8).validate(DENSE)


def test_sequential_is_one_lane_in_topological_order() -> None:
    pipeline = sequential(DENSE, 64)
    pipeline.validate(DENSE)
    assert [n.op for n in pipeline.nano_ops] == list(DENSE.ops)
    assert pipeline.slices == ((0, 64),)
    assert [lane.share for lane in pipeline.lanes] == [1.0]


@pytest.mark.parametrize("boundaries", [[], [1], [10, 63], list(range(1, 64))])
def test_nano_batches_cut_every_op(boundaries: list[int]) -> None:
    pipeline = nano_batches(DENSE, 64, boundaries)
    pipeline.validate(DENSE)
    assert len(pipeline.slices) == len(boundaries) + 1
    assert len(pipeline.nano_ops) == len(DENSE.ops) * len(pipeline.slices)


@pytest.mark.parametrize("boundaries", [[0], [64], [65], [-1], [8, 8], [9, 8]])
def test_bad_boundaries_are_refused(boundaries: list[int]) -> None:
    with pytest.raises(PipelineError, match="rise strictly between 0 and 64"):
        nano_batches(DENSE, 64, boundaries)


def changed(change: Callable[[list[NanoOp]], Any]) -> Pipeline:
    """Two nano-batches of 8 rows, with `change` made to the list of nano-operations."""
    pipeline = nano_batches(DENSE, 16, [8])
    nano_ops = list(pipeline.nano_ops)
    change(nano_ops)
    return replace(pipeline, nano_ops=tuple(nano_ops))


def shift(index: int, start: int, stop: int) -> Callable[[list[NanoOp]], Any]:
    def change(nano_ops: list[NanoOp]) -> None:
        nano_ops[index] = replace(nano_ops[index], start=start, stop=stop)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (shift(1, 9, 16), "must cover rows 0 to 16"),  # gap
        (shift(1, 7, 16), "must cover rows 0 to 16"),  # overlap
        (shift(1, 8, 15), "must cover rows 0 to 16"),  # too short
        (shift(1, 8, 17), "must cover rows 0 to 16"),  # too long
        (shift(1, 8, 8), "must cover rows 0 to 16"),  # empty
        (lambda n: n.pop(), "must cover rows 0 to 16"),
        (lambda n: n.append(n[-1]), "must cover rows 0 to 16"),
        (lambda n: n.append(NanoOp(Op.EXPERTS, 0, 16, "main")), "not part of this model's layer"),
        (lambda n: n.insert(0, n.pop()), "move it after"),
        (lambda n: n.insert(1, n.pop(2)), None),  # still after what it reads: the first half's attention may start
        (lambda n: n.insert(1, n.pop(3)), "move it after"),
        (lambda n: n.append(replace(n.pop(), lane="nowhere")), "'nowhere'"),
        (lambda n: n.append(replace(n.pop(), behind=-1)), "give 0 or more"),
        (lambda n: n.append(replace(n.pop(), behind=1)), "move it after"),  # QKV would read what comes later
        (lambda n: n.insert(0, replace(n.pop(), behind=1)), None),  # its layer's end, just before the next QKV
        (lambda n: n.insert(0, replace(n.pop(0), behind=1)), "as many layers behind"),
    ],
)
def test_validation(change: Callable[[list[NanoOp]], Any], sentence: str | None) -> None:
    if sentence is None:
        changed(change).validate(DENSE)
        return
    with pytest.raises(PipelineError, match=sentence):
        changed(change).validate(DENSE)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_shares_are_above_zero_and_at_most_one(share: float) -> None:
    with pytest.raises(PipelineError, match="shares are above 0"):
        replace(sequential(DENSE, 8), lanes=(LaneSpec("main", share),)).validate(DENSE)


def test_lanes_need_distinct_names() -> None:
    for lanes in ((), (LaneSpec("main"), LaneSpec("main"))):
        with pytest.raises(PipelineError, match="distinct names"):
            replace(sequential(DENSE, 8), lanes=lanes).validate(DENSE)


def test_an_empty_dense_batch_is_refused() -> None:
    with pytest.raises(PipelineError, match="at least 1"):
        Pipeline("none", 0, (LaneSpec("main"),), ()).validate(DENSE)


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads(sequential(DENSE, 8).to_json())
    change(data)
    return json.dumps(data).encode()


BAD_FILES = {
    "empty": b"",
    "not json": b"{",
    "binary": b"\xff\xfe\x00\x01",
    "deep": b"[" * 100_000,
    "list": b"[]",
    "number": b"3",
    "other format": edited(lambda d: d.update(format=99)),
    "no format": edited(lambda d: d.pop("format")),
    "no lanes": edited(lambda d: d.pop("lanes")),
    "lanes a number": edited(lambda d: d.update(lanes=3)),
    "lane without share": edited(lambda d: d["lanes"][0].pop("share")),
    "unknown op": edited(lambda d: d["nano_ops"][0].update(op="matmul")),
    "op missing": edited(lambda d: d["nano_ops"][0].pop("op")),
    "half a row": edited(lambda d: d["nano_ops"][0].update(stop=7.5)),
    "row as text": edited(lambda d: d["nano_ops"][0].update(start="0")),
    "half a layer behind": edited(lambda d: d["nano_ops"][0].update(behind=0.5)),
    "row as truth": edited(lambda d: d["nano_ops"][0].update(stop=True)),
    "endless batch": edited(lambda d: d.update(dense_batch=float("inf"))),
    "meta a text": edited(lambda d: d.update(meta="x")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad-pipeline.json"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(PipelineError, match=r"bad-pipeline\.json"):
        Pipeline.load(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("format"), 'lacks field .format.; add "format": 1'),
        (
            lambda d: d["nano_ops"][2].update(op="gateup"),
            "nano-operation 2 has the unknown op 'gateup'; known are qkv,",
        ),
        (lambda d: d["nano_ops"][1].pop("lane"), "nano-operation 1 lacks lane"),
        (lambda d: d["nano_ops"][1].update(layer=1), "nano-operation 1 has an unknown field 'layer'"),
        (lambda d: d["lanes"][0].update(cores=1), "lane 0 has an unknown field 'cores'; known are name, share"),
        (lambda d: d.update(model="x"), "the pipeline has an unknown field 'model'"),
    ],
)
def test_a_mistake_in_a_hand_written_file_is_pointed_at(change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    with pytest.raises(PipelineError, match=sentence):
        Pipeline.from_json(edited(change).decode())


def test_the_documented_example_is_a_whole_pipeline() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "pipeline-format.md"
    example = Pipeline.from_json(page.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0])
    example.validate(layer_graph(PRESETS[example.meta["model"]]))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(PipelineError, match=str(path)):
            Pipeline.load(path)


def test_save_and_load(tmp_path: Path) -> None:
    pipeline = replace(nano_batches(DENSE, 100, [30]), name="größer", meta={"made by": "a test"})
    pipeline.save(tmp_path / "p.json")
    assert Pipeline.load(tmp_path / "p.json") == pipeline


def test_copies_of_kv_pages_only_name_a_lane() -> None:
    plain = sequential(DENSE, 64)
    lanes = (*plain.lanes, LaneSpec("copies"), LaneSpec("more"))
    offload, reload = (NanoOp(op, 0, 64, "copies") for op in (Op.KV_OFFLOAD, Op.KV_RELOAD))
    named = Pipeline("p", 64, lanes, (*plain.nano_ops, offload, reload))
    named.validate(DENSE)
    assert (plain.copy_lane, named.copy_lane) == (0, 1)
    assert named.slices == plain.slices
    two = Pipeline("p", 64, lanes, (*plain.nano_ops, offload, NanoOp(Op.KV_RELOAD, 0, 64, "more")))
    with pytest.raises(PipelineError, match="must share a lane"):
        two.validate(DENSE)
