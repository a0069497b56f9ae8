"""From pairs that ran together to P(R), by the paper's definition and by the share that the lanes truly had.

P is the speed of an operation beside another, over its speed alone on the whole device. The paper (NanoFlow, section
4.1.2) defines R of a GEMM as its own P, and gives the rest, 1 − R, to the other operation of the pair. Pairs of the
same two resources are averaged: across shapes they spread by a few per cent (Table 3), and noise is larger than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanoflow.analysis.profile_table import Interference
from nanoflow.core.ops import RESOURCE, Op, Resource

Point = tuple[float, float]
SHARES_SLACK = 1e-6


@dataclass(frozen=True)
class PairResult:
    """Two operations that ran together; the first is the one whose P defines R. Times in µs, shares of the lanes.

    `implementation` is that of the kernels, `other_implementation` the collectives' where the other is one.
    """

    implementation: str
    op: Op
    tokens: int
    share: float
    alone_us: float
    together_us: float
    other: Op
    other_tokens: int
    other_share: float
    other_alone_us: float
    other_together_us: float
    other_implementation: str = ""

    @property
    def unshared(self) -> bool:
        """Whether both lanes had the whole device."""
        return self.share + self.other_share > 1.0 + SHARES_SLACK

    @property
    def p(self) -> float:
        """Performance of the first operation."""
        return self.alone_us / self.together_us

    @property
    def other_p(self) -> float:
        """Performance of the second operation."""
        return self.other_alone_us / self.other_together_us

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with both P."""
        return {**asdict(self), "p": self.p, "other_p": self.other_p}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PairResult:
        """The inverse of `to_dict`."""
        fields = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        return cls(**{**fields, "op": Op(fields["op"]), "other": Op(fields["other"])})


def interference(pairs: Iterable[PairResult]) -> tuple[Interference, ...]:
    """Both curves of each two resources that were measured together, in the order of `Resource`."""
    groups: dict[tuple[Resource, Resource], list[PairResult]] = {}
    for pair in pairs:
        groups.setdefault((RESOURCE[pair.op], RESOURCE[pair.other]), []).append(pair)
    found = []
    for (one, two), members in groups.items():
        shared = [pair for pair in members if not pair.unshared]
        by_share = [(pair.share, pair.p) for pair in shared]
        whole = [pair for pair in members if pair.unshared]
        found.append(
            Interference(
                one,
                two,
                rising((p, p) for _, p in by_share),
                rising(by_share),
                unshared=_mean_p([pair.p for pair in whole]),
            )
        )
        found.append(
            Interference(
                two,
                one,
                rising((1.0 - pair.p, pair.other_p) for pair in shared),
                rising((pair.other_share, pair.other_p) for pair in shared),
                unshared=_mean_p([pair.other_p for pair in whole]),
            )
        )
    order = list(Resource)
    return tuple(sorted(found, key=lambda pair: (order.index(pair.resource), order.index(pair.against))))


def rising(points: Iterable[Point]) -> tuple[Point, ...]:
    """The never falling curve nearest to `points` (isotonic regression by pooling neighbours), within 0 … 1.

    Points of one R are averaged. R = 0 and 1 are left out: P is 0 and 1 there by definition.
    """
    by_r: dict[float, list[float]] = {}
    for r, p in points:
        r = round(r, 4)
        if 0.0 < r < 1.0:
            by_r.setdefault(r, []).append(min(1.0, max(0.0, p)))
    blocks: list[tuple[list[float], float, int]] = []  # (R values, mean P, weight)
    for r in sorted(by_r):
        blocks.append(([r], _mean(by_r[r]), len(by_r[r])))
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            (left, a, m), (right, b, n) = blocks[-2:]
            blocks[-2:] = [(left + right, (a * m + b * n) / (m + n), m + n)]
    return tuple((r, p) for rs, p, _ in blocks for r in rs)


def _mean_p(values: Sequence[float]) -> float | None:
    """The mean, within what P can be; None of nothing."""
    return min(1.0, _mean(values)) if values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
