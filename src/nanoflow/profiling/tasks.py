"""What to measure: the list of single operations and of pairs, from sizes and the shares that the device can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import RESOURCE, Op, Resource
from nanoflow.profiling.synthetic import SteadyMix

GEMM_OPS = (Op.QKV, Op.O, Op.GATE_UP, Op.DOWN, Op.EXPERTS)
QUICK_GEMM_OPS = (Op.QKV, Op.GATE_UP, Op.EXPERTS)
QUICK_SIZES = 6
MOST_PAIR_SHARES = 8
BARE_GATHERS = (Op.ALL_GATHER, Op.REDUCE_SCATTER)
"""Measured for people: no pipeline runs them as they are."""

MOST_WIRE_SHARE = 0.4
MOST_WIRE_SHARES = 4
CPU_WIRE_SHARE = 0.05
"""The share of a CPU that a lane of collectives is said to have: they need no thread of ours, only time of cores."""


@dataclass(frozen=True)
class Settings:
    """How thorough a profile is: grain and largest of the sizes in tokens, and how long a loop runs in seconds.

    On the whole device a loop runs for `energy_seconds` at least, where that is longer: energy counters are slow. A
    quick profile measures nothing alone at smaller shares, which no search asks for.
    """

    step: int
    largest: int
    solo_seconds: float = 0.8
    pair_seconds: float = 1.0
    quick: bool = False
    energy_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.step < 1 or self.largest < self.step:
            raise ConfigError(f"sizes run from step {self.step} to largest {self.largest}; raise the latter.")

    @property
    def sizes(self) -> list[int]:
        """Multiples of the step up to the largest, and two smaller ones for slices of attention."""
        multiples = [*range(self.step, self.largest, self.step), self.largest]
        if self.quick and len(multiples) > QUICK_SIZES:
            last = len(multiples) - 1
            multiples = [multiples[round(i * last / (QUICK_SIZES - 1))] for i in range(QUICK_SIZES)]
        small = [self.step // 4, self.step // 2]
        return sorted({size for size in (*small, *multiples) if size >= 1})


@dataclass(frozen=True)
class Part:
    """What one lane repeats: an operation on so many tokens at a share; `variant` is a network operation's."""

    op: Op
    tokens: int
    share: float
    variant: str = ""


@dataclass(frozen=True)
class SoloTask:
    """One operation alone at a share. Of a network operation, `implementation` is the collectives'."""

    implementation: str
    op: Op
    tokens: int
    share: float

    @property
    def key(self) -> str:
        return f"{self.implementation}/{self.op}/{self.tokens}/{self.share:.4f}"

    @property
    def part(self) -> Part:
        return Part(self.op, self.tokens, self.share, variant_of(self.op, self.implementation))


@dataclass(frozen=True)
class PairTask:
    """`first` and `second` (operation, tokens) together, `first` with `share` and `second` with `other_share`.

    `implementation` is that of the kernels, `variant` the collectives' where the second is a network operation. Shares
    of 1 and 1: both may use the whole device, and the hardware decides.
    """

    implementation: str
    first: tuple[Op, int]
    second: tuple[Op, int]
    share: float
    other_share: float
    variant: str = ""

    @property
    def parts(self) -> tuple[Part, Part]:
        return Part(*self.first, self.share), Part(*self.second, self.other_share, self.variant)

    @property
    def key(self) -> str:
        (op, tokens), (other, others) = self.first, self.second
        wire = f"/{self.variant}/{self.other_share:.4f}" if self.variant else ""
        return f"{self.implementation}/{op}/{tokens}|{other}/{others}/{self.share:.4f}{wire}"


def variant_of(op: Op, implementation: str) -> str:
    """What a lane must know: network operations by several implementations work on one and the same subject."""
    return implementation if RESOURCE[op] is Resource.NETWORK else ""


Variants = Mapping[Op, Sequence[str]]
"""Implementations of each network operation."""

NO_VARIANTS: Variants = {}


def solo_tasks(
    implementation: str,
    ops: Sequence[Op],
    shares: Sequence[float],
    settings: Settings,
    variants: Variants = NO_VARIANTS,
) -> list[SoloTask]:
    """Every operation by every implementation at every size and share, the shares of one size next to each other."""
    used = [1.0] if settings.quick else sorted(shares, reverse=True)
    return [
        SoloTask(name, op, tokens, share)
        for op in ops
        for name in variants.get(op, (implementation,))
        for tokens in ([settings.largest] if settings.quick and op in BARE_GATHERS else settings.sizes)
        for share in used
    ]


def pair_tasks(
    implementation: str, ops: Sequence[Op], shares: Sequence[float], mix: SteadyMix, settings: Settings
) -> list[PairTask]:
    """Pairs of different resources at sizes of about half the dense batch, at every split of the device.

    GEMM with decode attention, prefill attention with decode attention, GEMM with KV copies.
    """
    half = settings.largest // 2 or 1
    decode, prefill = _attention(mix, settings)
    gemms = [(op, half) for op in (QUICK_GEMM_OPS if settings.quick else GEMM_OPS) if op in ops]
    copies = [(op, half) for op in (Op.KV_OFFLOAD, Op.KV_RELOAD) if op in ops]
    pairs = [(gemm, decode) for gemm in gemms] + [(prefill, decode)]
    if not settings.quick:
        pairs += [((op, settings.largest), (decode[0], 2 * decode[1])) for op, _ in gemms]
        pairs.append(((prefill[0], 2 * prefill[1]), (decode[0], 2 * decode[1])))
    pairs += [(gemm, other) for gemm in gemms[-1:] if settings.quick for other in copies[:1]]
    pairs += [(gemm, other) for gemm in gemms if not settings.quick for other in copies]
    splits = _splits(shares)
    return [PairTask(implementation, first, second, share, 1.0 - share) for first, second in pairs for share in splits]


def network_tasks(
    implementation: str,
    ops: Sequence[Op],
    splits: Sequence[tuple[float, float]],
    mix: SteadyMix,
    settings: Settings,
    variants: Variants,
) -> list[PairTask]:
    """GEMM and attention with each network operation that pipelines run, at about half the dense batch.

    `splits` are the shares of the two lanes, `variants` the implementations to take.
    """
    half = settings.largest // 2 or 1
    gemms = [(op, half) for op in (QUICK_GEMM_OPS if settings.quick else GEMM_OPS) if op in ops]
    firsts = [*gemms[-1:], _attention(mix, settings)[0]] if settings.quick else [*gemms, *_attention(mix, settings)]
    left_out = (*BARE_GATHERS, Op.O_GATHER) if settings.quick else BARE_GATHERS  # it is much like the other gather
    wires = [op for op in ops if RESOURCE[op] is Resource.NETWORK and op not in left_out]
    return [
        PairTask(implementation, first, (wire, half), *split, variant)
        for first in firsts
        for wire in wires
        for variant in variants[wire]
        for split in splits
    ]


def network_splits(kind: str, shares: Sequence[float]) -> list[tuple[float, float]]:
    """Shares of (the lane of products, the lane of collectives) that are worth trying on a device of `kind`.

    A GPU's collectives need few multiprocessors of their own; (1, 1) is two plain streams. A CPU's need no thread.
    """
    if kind == "cpu":
        return [(1.0 - CPU_WIRE_SHARE, CPU_WIRE_SHARE)]
    small = [share for share in _splits(shares) if share <= MOST_WIRE_SHARE][:MOST_WIRE_SHARES]
    return [*((1.0 - share, share) for share in small), (1.0, 1.0)]


def _attention(mix: SteadyMix, settings: Settings) -> tuple[tuple[Op, int], tuple[Op, int]]:
    """Decode and prefill attention on half of their part of the dense batch."""
    decode = (Op.DECODE_ATTENTION, max(1, min(settings.largest, mix.n_decode) // 2))
    return decode, (Op.PREFILL_ATTENTION, max(1, min(settings.largest, mix.n_prefill) // 2))


def _splits(shares: Sequence[float]) -> list[float]:
    """Shares below 1 whose rest the device can make as well, at most `MOST_PAIR_SHARES` of them."""
    usable = [s for s in sorted(shares) if s < 1.0 and any(abs(1.0 - s - other) < 1e-6 for other in shares)]
    if len(usable) <= MOST_PAIR_SHARES:
        return usable
    last = len(usable) - 1
    return [usable[round(i * last / (MOST_PAIR_SHARES - 1))] for i in range(MOST_PAIR_SHARES)]
