"""What to measure: the list of single operations and of pairs, from sizes and the shares that the device can make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.core.errors import ConfigError
from nanoflow.core.ops import Op
from nanoflow.profiling.synthetic import SteadyMix

GEMM_OPS = (Op.QKV, Op.O, Op.GATE_UP, Op.DOWN, Op.EXPERTS)
QUICK_GEMM_OPS = (Op.QKV, Op.GATE_UP, Op.EXPERTS)
QUICK_SIZES = 6
MOST_PAIR_SHARES = 8
COLLECTIVES = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER)


@dataclass(frozen=True)
class Settings:
    """How thorough a profile is: grain and largest of the sizes in tokens, and how long a loop runs in seconds.

    On the whole device a loop runs for `energy_seconds` at least, where that is longer: energy counters are slow.
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
class SoloTask:
    """One operation alone at a share."""

    implementation: str
    op: Op
    tokens: int
    share: float

    @property
    def key(self) -> str:
        return f"{self.implementation}/{self.op}/{self.tokens}/{self.share:.4f}"


@dataclass(frozen=True)
class PairTask:
    """`first` and `second` (operation, tokens) together, `first` with `share` and `second` with the rest."""

    implementation: str
    first: tuple[Op, int]
    second: tuple[Op, int]
    share: float

    @property
    def key(self) -> str:
        (op, tokens), (other, others) = self.first, self.second
        return f"{self.implementation}/{op}/{tokens}|{other}/{others}/{self.share:.4f}"


def solo_tasks(implementation: str, ops: Sequence[Op], shares: Sequence[float], settings: Settings) -> list[SoloTask]:
    """Every operation at every size and share, the shares of one size next to each other."""
    return [
        SoloTask(implementation, op, tokens, share)
        for op in ops
        for tokens in settings.sizes
        for share in sorted(shares, reverse=True)
    ]


def pair_tasks(
    implementation: str, ops: Sequence[Op], shares: Sequence[float], mix: SteadyMix, settings: Settings
) -> list[PairTask]:
    """Pairs of different resources at sizes of about half the dense batch, at every split of the device.

    GEMM with decode attention, prefill attention with decode attention, GEMM with KV copies. Collectives among `ops`
    (none on one rank) are paired with GEMMs as well.
    """
    half = settings.largest // 2 or 1
    decode = (Op.DECODE_ATTENTION, max(1, min(settings.largest, mix.n_decode) // 2))
    prefill = (Op.PREFILL_ATTENTION, max(1, min(settings.largest, mix.n_prefill) // 2))
    gemms = [(op, half) for op in (QUICK_GEMM_OPS if settings.quick else GEMM_OPS) if op in ops]
    copies = [(op, half) for op in (Op.KV_OFFLOAD, Op.KV_RELOAD) if op in ops]
    wires = [(op, half) for op in COLLECTIVES if op in ops]
    pairs = [(gemm, decode) for gemm in gemms] + [(prefill, decode)]
    if not settings.quick:
        pairs += [((op, settings.largest), (decode[0], 2 * decode[1])) for op, _ in gemms]
        pairs.append(((prefill[0], 2 * prefill[1]), (decode[0], 2 * decode[1])))
    pairs += [(gemm, other) for gemm in gemms[-1:] if settings.quick for other in (*copies[:1], *wires)]
    pairs += [(gemm, other) for gemm in gemms if not settings.quick for other in (*copies, *wires)]
    splits = _splits(shares)
    return [PairTask(implementation, first, second, share) for first, second in pairs for share in splits]


def _splits(shares: Sequence[float]) -> list[float]:
    """Shares below 1 whose rest the device can make as well, at most `MOST_PAIR_SHARES` of them."""
    usable = [s for s in sorted(shares) if s < 1.0 and any(abs(1.0 - s - other) < 1e-6 for other in shares)]
    if len(usable) <= MOST_PAIR_SHARES:
        return usable
    last = len(usable) - 1
    return [usable[round(i * last / (MOST_PAIR_SHARES - 1))] for i in range(MOST_PAIR_SHARES)]
