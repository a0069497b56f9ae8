"""Plans whose answer can be computed by hand, and a calibration that finds what was hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.analysis.serving import Group
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.presets import preset
from nanoflow.planning.calibration import N_ALONE, Loads, load_overheads, part_of, save_overheads, solve
from nanoflow.planning.fleet import Engine, Objective, Option, Planner, ReplicaKind, Traffic, cheapest
from nanoflow.planning.times import Overheads, WithOverheads

SPEC = preset("smollm2")
RATES = MachineRates("test", "bfloat16", flops_per_s=1e15, mem_bytes_per_s=4e12)
ENGINE = Engine(dense_batch=64, max_running=32, max_model_len=512)


@dataclass(frozen=True)
class Linear:
    """An iteration takes `base_s`, and `token_s` a token."""

    base_s: float
    token_s: float
    source: str = "test"

    def seconds(self, batch: BatchShape) -> float:
        return self.base_s + self.token_s * batch.n_tokens


def _kind(times: Linear, devices: int = 1, memory_bytes: float = 2e9) -> ReplicaKind:
    return ReplicaKind(SPEC, "bfloat16", Group(RATES, memory_bytes, devices), times, ENGINE)


TRAFFIC = Traffic("20/20", most_requests=300)


def test_the_fewest_replicas_carry_the_rate() -> None:
    kind = _kind(Linear(1e-4, 1e-3))  # some 1000 tokens/s: 25 requests/s of 40 tokens
    planner = Planner(Objective(100.0, 0.5), TRAFFIC)
    found = planner.fewest(kind)
    assert found.meets
    assert found.replicas in (4, 5)
    assert kind.capacity_rps(*TRAFFIC.lengths()) == pytest.approx(25, rel=0.05)


def test_a_tight_limit_takes_more_replicas() -> None:
    kind = _kind(Linear(1e-4, 1e-3))
    loose, tight = (Planner(Objective(60.0, limit), TRAFFIC).fewest(kind) for limit in (0.5, 0.008))
    assert tight.meets
    assert tight.replicas > loose.replicas
    one_fewer = Planner(Objective(60.0, 0.008), TRAFFIC).fixed(kind, tight.replicas - 1)
    assert not one_fewer.meets


def test_what_cannot_be_done_says_why() -> None:
    slow = Planner(Objective(1.0, 0.01), TRAFFIC).fewest(_kind(Linear(0.02, 1e-3)))
    assert not slow.meets
    assert "alone" in slow.reason
    small = Planner(Objective(1.0, 0.01), TRAFFIC).fewest(_kind(Linear(0.0, 1e-3), memory_bytes=1e8))
    assert not small.meets
    assert "memory" in small.reason
    waiting = Planner(Objective(5.0, 0.05, first_token_s=0.001), TRAFFIC).fewest(_kind(Linear(0.002, 1e-4)))
    assert not waiting.meets
    assert "alone" in waiting.reason


def test_the_cheapest_has_the_fewest_gpus() -> None:
    wide, narrow = (Option(_kind(Linear(0, 1), tp), 4 // tp, meets=True) for tp in (2, 1))
    fewer = Option(_kind(Linear(0, 1), 1), 3, meets=False)
    assert cheapest([wide, narrow, fewer]) is narrow
    assert cheapest([fewer]) is None


def test_thousands_of_replicas_are_quick_and_in_proportion() -> None:
    kind = _kind(Linear(1e-4, 1e-3))
    found = Planner(Objective(25_000.0, 0.5), TRAFFIC, simulated=2).fewest(kind)
    assert found.meets
    assert 1000 <= found.replicas <= 1200
    assert found.simulation is not None
    assert found.simulation.replicas == 2


def test_objectives_are_checked() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Objective(0.0, 0.1)
    with pytest.raises(ConfigError, match="p50"):
        Objective(1.0, 0.1, statistic="p12")


def test_a_calibration_finds_the_hidden_overheads(tmp_path: Path) -> None:
    kind, hidden = _kind(Linear(0.004, 2e-4)), Overheads(1.3, 0.002, 0.01)
    real = replace(kind, times=WithOverheads(kind.times, hidden), overheads=hidden)
    alone, burst = TRAFFIC.requests(N_ALONE, 1.0), Traffic("20/20", arrivals="at once").requests(24, 1.0)
    one = real.run(part_of(alone, 0)).jobs[0]
    assert one.first_s is not None
    assert one.finished_s is not None
    per_token_s = (one.finished_s - one.first_s) / (one.output_tokens - 1)
    loads = Loads(alone, burst, per_token_s, one.first_s + hidden.request_s, real.run(burst).elapsed_s)
    found = solve(kind, loads)
    assert found.slowdown == pytest.approx(hidden.slowdown, rel=0.05)
    assert found.iteration_s == pytest.approx(hidden.iteration_s, abs=3e-4)
    assert found.request_s == pytest.approx(hidden.request_s, abs=1e-3)
    path = tmp_path / "calibration.json"
    save_overheads(found, path)
    assert load_overheads(path) == found
    path.write_text("{}x")
    with pytest.raises(ConfigError, match="--calibrate"):
        load_overheads(path)
