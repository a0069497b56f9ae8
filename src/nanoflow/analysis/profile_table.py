"""The profile: what a machine was measured to need for each operation, alone and beside another, as plain data.

The profiler fills it, the search reads it, a file keeps it. A profile is true of one machine, one model, one precision
and one number of ranks only; the file says which, and is refused elsewhere. Contradictions are found when it is read,
not when a search has gone wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nanoflow.analysis.curve import Curve
from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import KIND, Op, Resource

PROFILE_FORMAT = 1
P_NOISE = 0.05
"""How far a measured P(R) may fall while R grows, or exceed 1. The paper's spread over GEMM shapes (Table 3)."""
TIME_NOISE = 0.3
"""How far a time may fall while tokens grow (other kernels are chosen at other sizes); more is a contradiction."""


@dataclass(frozen=True)
class SoloTime:
    """One operation alone: median time, its relative spread, and energy above idle where it could be read."""

    op: Op
    tokens: int
    time_us: float
    share: float = 1.0
    implementation: str = ""
    spread: float = 0.0
    energy_mj: float | None = None

    def __post_init__(self) -> None:
        where = f"{self.op} at {self.tokens} tokens"
        if not (math.isfinite(self.time_us) and self.time_us > 0):
            raise ConfigError(f"{where} takes {self.time_us} µs in the profile; times are above 0: profile it again.")
        if self.tokens < 1:
            raise ConfigError(f"the profile has {where}; sizes are at least 1.")
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"{where} has share {self.share}; shares are above 0 and at most 1.")
        if self.energy_mj is not None and not (math.isfinite(self.energy_mj) and self.energy_mj >= 0):
            raise ConfigError(f"{where} costs {self.energy_mj} mJ in the profile; energies are not negative.")


@dataclass(frozen=True)
class Interference:
    """Performance of `resource` beside `against`, as points (R, P) with P(0) = 0 and P(1) = 1 understood.

    `points` follow the paper's definition: R of compute is its own P, R of the other is 1 − R of compute. `by_share` is
    the same by the share that the device truly gave the lane; where it is known, it is the one that counts. `unshared`
    is P where both lanes may use the whole device and the hardware decides; None where that was not measured.
    """

    resource: Resource
    against: Resource
    points: tuple[tuple[float, float], ...]
    by_share: tuple[tuple[float, float], ...] = ()
    unshared: float | None = None

    def curve(self) -> Curve:
        """P over R as a rising curve. Raises `ConfigError` for points that contradict each other."""
        name = f"P(R) of {self.resource} beside {self.against}"
        given = dict(_distinct(self.by_share or self.points, name))
        points = sorted({0.0: 0.0, 1.0: 1.0, **given}.items())
        for r, p in points:
            if not 0.0 <= r <= 1.0 or not 0.0 <= p <= 1.0 + P_NOISE:
                raise ConfigError(f"{name}: ({r}, {p}) is out of range; both are from 0 to 1. Measure the pair again.")
        if points[0][1] > P_NOISE or points[-1][1] < 1.0 - P_NOISE:
            raise ConfigError(f"{name} must be 0 at R = 0 and 1 at R = 1, got {points[0][1]} and {points[-1][1]}.")
        return Curve.rising(points, name, tolerance=P_NOISE).scaled(1.0 / max(p for _, p in points))


@dataclass(frozen=True)
class Power:
    """Power cap and idle power of one device, in watts."""

    cap_w: float
    idle_w: float

    def __post_init__(self) -> None:
        if not self.cap_w > self.idle_w >= 0:
            raise ConfigError(f"the power cap ({self.cap_w} W) must exceed idle power ({self.idle_w} W).")


@dataclass(frozen=True)
class ProfileTable:
    """A profile. `machine` is its fingerprint: whatever must be equal for the times to hold (device, versions)."""

    model: str
    dtype: str
    ranks: int
    machine: Mapping[str, str]
    solo: tuple[SoloTime, ...]
    interference: tuple[Interference, ...] = ()
    power: Power | None = None
    note: str = field(default="", compare=False)
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"ranks of a profile must be at least 1, not {self.ranks}.")
        _distinct(((pair.resource, pair.against) for pair in self.interference), "interference")
        _ = self._times, self._curves  # contradictions are found here

    @cached_property
    def _times(self) -> dict[tuple[Op, float], dict[str, Curve]]:
        grouped: dict[tuple[Op, float], dict[str, list[tuple[float, float]]]] = {}
        for entry in self.solo:
            by_name = grouped.setdefault((entry.op, entry.share), {})
            by_name.setdefault(entry.implementation, []).append((float(entry.tokens), entry.time_us))
        return {
            key: {
                name: Curve.rising(
                    _distinct(points, f"time of {key[0]} ({name or 'default'})"), str(key[0]), TIME_NOISE, True
                )
                for name, points in by_name.items()
            }
            for key, by_name in grouped.items()
        }

    @cached_property
    def _curves(self) -> dict[Resource, tuple[Curve, ...]]:
        curves: dict[Resource, tuple[Curve, ...]] = {}
        for pair in self.interference:
            curves[pair.resource] = (*curves.get(pair.resource, ()), pair.curve())
        return curves

    def measured_op(self, op: Op) -> Op:
        """The operation whose times `op` takes: itself if measured, else its kind (`O_REDUCE` is an `ALL_REDUCE`)."""
        known = {key[0] for key in self._times}
        for candidate in (op, KIND.get(op, op)):
            if candidate in known:
                return candidate
        raise ConfigError(f"the profile of {self.model} holds no time of {op}; profile it (nanoflow profile).")

    def best(self, op: Op, tokens: float, share: float = 1.0) -> tuple[str, float]:
        """The fastest implementation of `op` on `tokens` tokens at `share`, and its time in µs.

        Piecewise linear between measured sizes, constant below the smallest. Raises `ConfigError` beyond the largest,
        and for a share that was not measured.
        """
        by_name = self._times.get((self.measured_op(op), share))
        if by_name is None:
            raise ConfigError(f"the profile holds no time of {op} alone at share {share}; profile it at that share.")
        reachable = {name: curve(tokens) for name, curve in by_name.items() if tokens <= curve.last_x}
        if not reachable:
            largest = max(curve.last_x for curve in by_name.values())
            raise ConfigError(f"{op} was profiled up to {largest:.0f} tokens, not {tokens:.0f}; profile larger sizes.")
        name = min(reachable, key=lambda key: (reachable[key], key))
        return name, reachable[name]

    def time_us(self, op: Op, tokens: float, share: float = 1.0) -> float:
        """Time of `op` alone on `tokens` tokens in µs, by its fastest implementation; see `best`."""
        return self.best(op, tokens, share)[1]

    def performance(self, resource: Resource, share: float) -> float:
        """P(R): the part of its solo speed that an op of `resource` keeps at share R while the others use the rest.

        The lowest of the measured pairs. Compute without a curve by true share is P = R, by the definition of R;
        another resource that was never measured beside anything raises `ConfigError`.
        """
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"a share must lie between 0 and 1, not {share}.")
        curves = self._curves.get(resource)
        if curves is not None:
            return min(curve(share) for curve in curves)
        if resource is Resource.COMPUTE or share in (0.0, 1.0):
            return share
        raise ConfigError(f"the profile has no interference of {resource}; profile pairs of compute with {resource}.")

    def unshared(self, resource: Resource, against: Resource) -> float | None:
        """P of `resource` beside `against` where both may use the whole device; None if that was not measured."""
        found = (pair.unshared for pair in self.interference if (pair.resource, pair.against) == (resource, against))
        return next(found, None)

    def overlapped_us(self, op: Op, resource: Resource, tokens: float, share: float) -> float:
        """T_overlap = T_single / P(R) in µs (NanoFlow, section 4.1.2); infinite where P is 0."""
        performance = self.performance(resource, share)
        return self.time_us(op, tokens) / performance if performance > 0 else math.inf

    def energy_mj(self, op: Op, tokens: float) -> float | None:
        """Energy above idle of `op` in mJ, by its fastest implementation; None where it was not measured."""
        measured = self.measured_op(op)
        name, _ = self.best(op, tokens)
        entries = [e for e in self.solo if e.op == measured and e.share == 1.0 and e.implementation == name]
        points = [(float(e.tokens), e.energy_mj) for e in entries if e.energy_mj is not None]
        return Curve.rising(points, f"energy of {op}", math.inf, True)(tokens) if points else None

    def check_matches(self, fingerprint: Mapping[str, str]) -> None:
        """Raise `ConfigError` naming the first difference unless the profile was made on this very machine."""
        for key in sorted({*self.machine, *fingerprint}):
            there, here = self.machine.get(key), fingerprint.get(key)
            if there != here:
                raise ConfigError(
                    f"the profile was made with {key} = {there}, this machine has {here}; run nanoflow profile again."
                )

    def to_json(self) -> str:
        """The JSON form; `from_json` reads it back equal."""
        data = {"format": PROFILE_FORMAT, **asdict(self), "machine": dict(self.machine)}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ProfileTable:
        """Read the JSON form. Raises `ConfigError` for another format version, a missing field or a contradiction."""
        try:
            data = json.loads(text)
            if data.get("format") != PROFILE_FORMAT:
                raise ConfigError(f"profile format {data.get('format')!r} is not {PROFILE_FORMAT}; profile again.")
            return cls(
                model=str(data["model"]),
                dtype=str(data["dtype"]),
                ranks=int(data["ranks"]),
                machine={str(key): str(value) for key, value in data["machine"].items()},
                solo=tuple(SoloTime(**{**entry, "op": Op(entry["op"])}) for entry in data["solo"]),
                interference=tuple(_read_interference(pair) for pair in data.get("interference", ())),
                power=Power(**data["power"]) if data.get("power") else None,
                note=str(data.get("note", "")),
                expert_parallel=bool(data.get("expert_parallel", False)),
            )
        except ConfigError:
            raise
        except KeyError as error:
            raise ConfigError(f"the profile lacks field {error}; profile again.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the profile is not valid: {error}; profile again.") from error

    def save(self, path: Path) -> None:
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ProfileTable:
        """Read a profile file. Raises `ConfigError` naming the file."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read profile {path}: {error.strerror}; check the path.") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _read_interference(data: Mapping[str, Any]) -> Interference:
    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((float(r), float(p)) for r, p in data.get(name, ()))

    unshared = data.get("unshared")
    return Interference(
        Resource(data["resource"]),
        Resource(data["against"]),
        points("points"),
        points("by_share"),
        None if unshared is None else float(unshared),
    )


def _distinct(pairs: Iterable[tuple[Any, Any]], what: str) -> list[tuple[Any, Any]]:
    """The pairs; `ConfigError` if a first half of points (or a whole pair of names) occurs twice."""
    listed = list(pairs)
    keys = [pair if isinstance(pair[0], str) else pair[0] for pair in listed]
    if len(set(keys)) != len(keys):
        raise ConfigError(f"{what} is given twice for one point in the profile; keep one.")
    return listed
