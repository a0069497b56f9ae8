"""How long prompts and answers are: the workloads that bounds, benchmarks and searches are computed for.

A workload is constant, log-normal by mean and deviation (what papers print), or a CSV trace. Sampling is seeded and
stratified (one draw from each of n equally likely slices, shuffled), so a few thousand samples already have the mean
and deviation that were asked for. Lengths are tokens, at least 1 and at most `longest`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nanoflow.core.errors import ConfigError

Lengths: TypeAlias = npt.NDArray[np.int64]

DEFAULT_LONGEST = 8192
"""Longest prompt or answer of the built-in workloads; their means and deviations hold with it."""
BISECTIONS = 60
LONG_TAIL = 100
NORMAL = NormalDist()


class Distribution(Protocol):
    """Lengths of prompts, or of answers."""

    def sample(self, n: int, rng: np.random.Generator) -> Lengths:
        """`n` lengths in random order."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every length the same."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"a constant length must be at least 1 token, not {self.length}.")

    def sample(self, n: int, rng: np.random.Generator) -> Lengths:
        return np.full(n, self.length, dtype=np.int64)


@dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths, cut off at `longest`, with this mean and standard deviation after the cut."""

    mean: float
    deviation: float
    longest: int = DEFAULT_LONGEST

    def __post_init__(self) -> None:
        if not 1 <= self.mean < self.longest:
            raise ConfigError(f"the mean length must be at least 1 and below longest={self.longest}, not {self.mean}.")
        # No distribution on [0, longest] spreads more than one that takes only the two ends.
        widest = math.sqrt(self.mean * (self.longest - self.mean))
        if not 0 < self.deviation < 0.9 * widest:
            raise ConfigError(
                f"a deviation of {self.deviation} is impossible with mean {self.mean} and longest {self.longest}; "
                f"choose one above 0 and below {0.9 * widest:.0f}, or a greater longest."
            )

    def sample(self, n: int, rng: np.random.Generator) -> Lengths:
        mu, sigma = fit_capped_log_normal(self.mean, self.deviation, self.longest)
        within = rng.random(n)
        within[n - max(1, n // LONG_TAIL) :] = 0.5  # where one draw would decide the deviation, take the slice's middle
        uniform = (np.arange(n) + within) / n
        normal = np.array([NORMAL.inv_cdf(u) for u in np.clip(uniform, 1e-12, 1 - 1e-12).tolist()])
        lengths = np.rint(np.exp(mu + sigma * normal)).clip(1, self.longest).astype(np.int64)
        rng.shuffle(lengths)
        return lengths


@dataclass(frozen=True)
class Workload:
    """Prompts and answers, drawn independently of each other."""

    name: str
    prompts: Distribution
    answers: Distribution

    def sample(self, n: int, seed: int = 0) -> tuple[Lengths, Lengths]:
        """Prompt and answer lengths of `n` requests; equal seeds give equal lengths."""
        rng = np.random.default_rng(seed)
        return self.prompts.sample(n, rng), self.answers.sample(n, rng)


@dataclass(frozen=True)
class TraceWorkload:
    """Requests of a recorded trace; prompt and answer stay together."""

    name: str
    prompt_lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]

    def sample(self, n: int, seed: int = 0) -> tuple[Lengths, Lengths]:
        """`n` requests in random order, none drawn again before all were drawn once."""
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(len(self.prompt_lengths)) for _ in range(-(-n // len(self.prompt_lengths)))]
        rows = np.concatenate(rounds)[:n]
        return np.array(self.prompt_lengths, dtype=np.int64)[rows], np.array(self.answer_lengths, dtype=np.int64)[rows]


AnyWorkload: TypeAlias = Workload | TraceWorkload

# Means and deviations as NanoFlow (OSDI'25, arXiv 2408.12757) prints them for its three data sets.
BUILT_IN: dict[str, Workload] = {
    "splitwise": Workload("splitwise", LogNormal(1155, 1109), LogNormal(211, 163)),
    "lmsys-chat": Workload("lmsys-chat", LogNormal(102, 169), LogNormal(222, 210)),
    "sharegpt": Workload("sharegpt", LogNormal(246, 547), LogNormal(322, 244)),
}


def find_workload(text: str) -> AnyWorkload:
    """The workload that `text` names: a built-in, `IN/OUT` constant lengths, or the path of a CSV trace.

    `IN` and `OUT` may each be `MEAN~DEVIATION` for a log-normal one, e.g. `1155~1109/211~163`. Raises `ConfigError`
    with the forms that are understood.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]
    if text.endswith(".csv"):
        return read_trace(Path(text))
    prompts, slash, answers = text.partition("/")
    if slash:
        return Workload(text, _parse_side(prompts, text), _parse_side(answers, text))
    raise ConfigError(
        f"workload {text!r} is not known; give {', '.join(BUILT_IN)}, IN/OUT lengths such as 512/512, "
        "MEAN~DEVIATION for either, or a .csv file."
    )


def read_trace(path: Path) -> TraceWorkload:
    """A trace with the columns `input_len` and `output_len` (others are ignored). `ConfigError` names a bad row."""
    prompts: list[int] = []
    answers: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = {"input_len", "output_len"} - set(reader.fieldnames or ())
            if missing:
                raise ConfigError(f"{path} lacks the column {' and '.join(sorted(missing))}; add it to the header.")
            for row in reader:
                prompts.append(_positive(row["input_len"], path, reader.line_num))
                answers.append(_positive(row["output_len"], path, reader.line_num))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}; check the path.") from error
    if not prompts:
        raise ConfigError(f"trace {path} holds no request; it needs rows of input_len,output_len.")
    return TraceWorkload(path.stem, tuple(prompts), tuple(answers))


@lru_cache(maxsize=64)
def fit_capped_log_normal(mean: float, deviation: float, longest: int) -> tuple[float, float]:
    """(mu, sigma) of the log-normal X for which min(X, longest) has this mean and deviation.

    Uses E[min(X, c)^k] = e^(kμ + k²σ²/2) Φ((ln c − μ − kσ²)/σ) + c^k (1 − Φ((ln c − μ)/σ)). For a given sigma the mean
    rises with mu, and along that curve the deviation rises with sigma, so two nested bisections find the pair.
    """

    def moment(k: int, mu: float, sigma: float) -> float:
        below = NORMAL.cdf((math.log(longest) - mu - k * sigma**2) / sigma)
        above = 1.0 - NORMAL.cdf((math.log(longest) - mu) / sigma)
        return math.exp(k * mu + (k * sigma) ** 2 / 2) * below + float(longest) ** k * above

    def mu_for(sigma: float) -> float:
        low = math.log(mean) - sigma**2 / 2  # the mean without a cut, so too low with one
        return _bisect(lambda mu: moment(1, mu, sigma) - mean, low - 1e-9, low + sigma**2 + 8.0)

    def excess(sigma: float) -> float:
        return moment(2, mu_for(sigma), sigma) - mean**2 - deviation**2

    sigma = _bisect(excess, 1e-3, 8.0)
    return mu_for(sigma), sigma


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses zero."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _parse_side(side: str, text: str) -> Distribution:
    mean, tilde, deviation = side.partition("~")
    try:
        return LogNormal(float(mean), float(deviation)) if tilde else Constant(int(side))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"workload {text!r} must hold whole numbers, as in 512/512 or 1155~1109/211~163.") from error


def _positive(cell: str | None, path: Path, line: int) -> int:
    try:
        value = int(cell or "")
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"{path} line {line}: {cell!r} is no length; use whole numbers of at least 1.")
    return value
