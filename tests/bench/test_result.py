"""The result format: what is written is read back equal, and what is damaged is refused with its place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nanoflow.bench import result as r
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates

RATES = MachineRates("A card", "bfloat16", 6e14, 4e12, power_budget_w=500.0, measured=True)


def full_result() -> r.BenchResult:
    """A result with every field set."""
    bound = r.Bound("work done, measured rates", "memory", 1.0, 50.0, {"memory": 1.0}, {"memory": 50.0}, 1e4, RATES)
    run = r.Run(
        seed=3,
        elapsed_s=2.0,
        numbers={"tokens_per_s": 5000.0},
        bounds=(bound,),
        energy=r.Energy(100.0, 50.0, 10.0, 20.0),
        requests={"arrival_s": (0.0, 0.5), "first_token_s": (1, None), "status": ("ok", "failed")},
        iterations={"tokens": (256, 12)},
    )
    series = r.Series(
        name="sequential",
        runs=(run,),
        numbers={"tokens_per_s": 5000.0},
        options={"dense_batch": 256, "asynchronous": True},
        pipeline={"format": 1, "name": "sequential"},
        rate_rps=2.5,
        trace=r.IterationTrace(
            3, 100.0, 256, 250, (r.OpTime("qkv", 30.0, 16, 30.0),), (r.SpanInfo("embed", "main", 0.0, 1.0),)
        ),
        resources=r.ResourceUse(10.0, (10.0, 90.0), (50.0, 60.0)),
    )
    return r.BenchResult(
        kind=r.BenchKind.ABLATION,
        title="A title",
        started_at="2026-01-01T00:00:00+00:00",
        command=("nanoflow", "bench"),
        versions={"nanoflow": "1"},
        machine=r.MachineInfo("A card", "cuda", 1, 1e11, RATES, {"torch": "2"}),
        model=r.ModelInfo("m", "bfloat16", "random", 10, {"n_layers": 2}),
        workload=r.WorkloadInfo("512/512", 2, 0, 512.0, 0.0, 512.0, 0.0),
        series=(series, r.Series("overlap", not_applicable="one rank")),
        engine={"dense_batch": 256},
        seeds=(3,),
        client=r.ClientOverhead("against a stub", 10.0, 20.0, 1.0),
        numbers={"highest_sustained_rate_rps": 2.5},
        notes=("a note",),
    )


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    full_result().save(path)
    assert r.load_result(path) == full_result()
    assert [item.name for item in path.parent.iterdir()] == ["result.json"]


def test_every_field_of_the_example_is_set() -> None:
    """Keeps the round trip honest when a field is added."""
    defaults = {item.name for item in dataclasses.fields(r.BenchResult) if item.default is not dataclasses.MISSING}
    example = full_result()
    unset = [name for name in defaults - {"target", "format"} if not getattr(example, name)]
    assert not unset


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.update(surprise=1), "unknown field 'surprise'"),
        (lambda d: d.pop("machine"), "lacks the field 'machine'"),
        (
            lambda d: d["series"][0]["runs"][0].update(elapsed_s="long"),
            r"series\[0\].runs\[0\].elapsed_s must be a",
        ),
        (lambda d: d.update(kind="quick"), "kind must be one of offline"),
        (lambda d: d["series"][0].update(runs={}), "must be a list"),
        (lambda d: d.update(title=True), "title must be str"),
        (lambda d: d["machine"].update(rates={"name": "x"}), "rates lacks the field 'dtype'"),
    ],
)
def test_damage_is_refused_with_its_place(change: object, said: str) -> None:
    data = json.loads(full_result().to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=said):
        r.parse_result(json.dumps(data))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "offline"}'])
def test_what_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="nanoflow bench"):
        r.parse_result(text)


def test_missing_file_and_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        r.load_result(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        full_result().save(tmp_path / "file" / "result.json")


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    broken = dataclasses.replace(full_result(), numbers={"x": float("nan")})
    with pytest.raises(ConfigError, match="nan"):
        broken.to_json()
