"""Which pipeline is really fastest: contenders run in turn on the device, and statistics decide, not predictions.

Each round runs every contender once, in an order that a seed shuffles, so that slow changes of the machine touch all
alike; a contender is judged by its ratio to the sequential pipeline within the same round. The fastest one is kept only
if the confidence interval of that ratio lies below 1; otherwise the sequential pipeline stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.pipeline.pipeline import Pipeline

SEQUENTIAL = "sequential"
RESAMPLES = 4000
CONFIDENCE = 0.95
WARM_UP_ROUNDS = 1

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """A pipeline with its predicted time a layer in µs, over all layers of the model.

    One that is another contender with other implementations alone says which one (`form_of`).
    """

    pipeline: Pipeline
    predicted_us: float
    form_of: str = ""

    @property
    def name(self) -> str:
        return self.pipeline.name

    @property
    def collectives(self) -> list[str]:
        """The implementations of network operations that it names."""
        return sorted({n.variant for n in self.pipeline.nano_ops if n.variant and RESOURCE[n.op] is Resource.NETWORK})


@dataclass(frozen=True)
class IterationTime:
    """One iteration: from the embedding to the sampled tokens, and the mean of its layers, in µs.

    `watts` is the device's mean power meanwhile; None where it cannot be read.
    """

    iteration_us: float
    layer_us: float
    watts: float | None = None


@dataclass(frozen=True)
class Measured:
    """A contender after all rounds: medians, spread (middle half over median) and its ratio to sequential.

    `ratio` is the median over rounds of (time / sequential's time), `low` and `high` its confidence interval, corrected
    for the number of contenders; `faster` the part of bootstrap resamples in which it beats the sequential pipeline.
    """

    contender: Contender
    iteration_us: float
    layer_us: float
    spread: float
    ratio: float
    low: float
    high: float
    faster: float
    watts: float | None = None

    @property
    def iteration_mj(self) -> float | None:
        """Energy of an iteration, idle power included."""
        return None if self.watts is None else self.watts * self.iteration_us / 1e3

    @property
    def prediction_error(self) -> float:
        """(predicted − measured) / measured, of the time a layer."""
        return self.contender.predicted_us / self.layer_us - 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.contender.name,
            "nano_ops": len(self.contender.pipeline.nano_ops),
            "lanes": {lane.name: lane.share for lane in self.contender.pipeline.lanes},
            "collectives": self.contender.collectives,
            "predicted_layer_us": self.contender.predicted_us,
            "measured_layer_us": self.layer_us,
            "prediction_error": self.prediction_error,
            "measured_iteration_us": self.iteration_us,
            "measured_watts": self.watts,
            "measured_iteration_mj": self.iteration_mj,
            "spread": self.spread,
            "ratio_to_sequential": self.ratio,
            "ratio_interval": [self.low, self.high],
            "confidence_faster": self.faster,
        }


@dataclass(frozen=True)
class Verdict:
    """All contenders as measured, in the order given, and the winner's place among them."""

    measured: tuple[Measured, ...]
    winner: int
    rounds: int

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline to keep."""
        return self.measured[self.winner].contender.pipeline

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Forms of other contenders have what they save over these, in µs a layer."""
        layer_us = {one.contender.name: one.layer_us for one in self.measured}
        candidates = [one.to_dict() for one in self.measured]
        for one, told in zip(self.measured, candidates, strict=True):
            if base := one.contender.form_of:
                told |= {"form_of": base, "saved_layer_us": layer_us[base] - one.layer_us}
        return {
            "winner": self.pipeline.name,
            "rounds": self.rounds,
            "confidence": CONFIDENCE,
            "candidates": candidates,
        }


Measure = Callable[[Contender], IterationTime]
OnRound = Callable[[int, int, str], None]


def verify(
    contenders: Sequence[Contender],
    measure: Measure,
    *,
    rounds: int,
    seed: int = 0,
    on_round: OnRound | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Run `contenders` (one of them named `sequential`) for `rounds` rounds, at least three even if out of time."""
    names = [contender.name for contender in contenders]
    if names.count(SEQUENTIAL) != 1 or len(set(names)) != len(names) or rounds < 3:
        raise ConfigError(
            f"verification needs distinct names with one 'sequential' and 3 rounds, got {names}, {rounds}."
        )
    shuffle = random.Random(seed)
    order = list(range(len(contenders)))
    times: list[list[IterationTime]] = []
    for number in range(WARM_UP_ROUNDS + rounds):
        shuffle.shuffle(order)
        one_round = {}
        for place, index in enumerate(order):
            if on_round is not None:
                on_round(number * len(order) + place, (WARM_UP_ROUNDS + rounds) * len(order), names[index])
            one_round[index] = measure(contenders[index])
        if number >= WARM_UP_ROUNDS:
            times.append([one_round[index] for index in range(len(contenders))])
        if len(times) >= 3 and out_of_time():
            break
    return judge(contenders, times, seed)


def judge(contenders: Sequence[Contender], times: Sequence[Sequence[IterationTime]], seed: int = 0) -> Verdict:
    """The verdict over `times[round][contender]`."""
    iteration = np.array([[one.iteration_us for one in row] for row in times])
    layer = np.array([[one.layer_us for one in row] for row in times])
    base = next(index for index, contender in enumerate(contenders) if contender.name == SEQUENTIAL)
    rivals = max(1, len(contenders) - 1)
    measured = []
    for index, contender in enumerate(contenders):
        ratios = iteration[:, index] / iteration[:, base]
        low, high, faster = interval(ratios, 1.0 - (1.0 - CONFIDENCE) / rivals, seed)
        quarters = np.quantile(iteration[:, index], [0.25, 0.5, 0.75])
        measured.append(
            Measured(
                contender,
                iteration_us=float(quarters[1]),
                layer_us=float(np.median(layer[:, index])),
                spread=float((quarters[2] - quarters[0]) / quarters[1]),
                ratio=float(np.median(ratios)),
                low=low,
                high=high,
                faster=faster,
                watts=_median_watts([row[index] for row in times]),
            )
        )
    proven = [index for index, one in enumerate(measured) if one.high < 1.0]
    winner = min(proven, key=lambda index: measured[index].ratio, default=base)
    return Verdict(tuple(measured), winner, len(times))


def _median_watts(times: Sequence[IterationTime]) -> float | None:
    known = [one.watts for one in times if one.watts is not None]
    return float(np.median(known)) if known else None


def interval(ratios: Floats, confidence: float, seed: int) -> tuple[float, float, float]:
    """Bootstrap interval of the median of `ratios` (B. Efron, 1979), and how many resamples have a median below 1."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(medians, [tail, 1.0 - tail])
    return float(low), float(high), float(np.mean(medians < 1.0))
