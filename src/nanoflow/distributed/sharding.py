"""Which part of a model each tensor-parallel rank holds: arithmetic on a `ModelSpec`, no tensors.

The rules are Megatron's (arXiv 1909.08053): QKV and gate-up are split by output columns, O and down by input columns,
embedding and LM head by vocabulary; experts are split by width, like the plain feed-forward, or with expert parallelism
by number. Nothing needs to divide evenly: earlier ranks take one unit more. Where ranks exceed the KV heads, several
ranks hold a copy of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from nanoflow.core.errors import ConfigError
from nanoflow.core.model_spec import ModelSpec

WIDTH_UNIT = 16
"""Feed-forward columns that stay together where the width allows: what matrix units like to work on."""


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of some dimension."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, factor: int) -> Span:
        """The same span where each element is `factor` wide."""
        return Span(self.start * factor, self.stop * factor)


def partition(n: int, parts: int, unit: int = 1) -> tuple[Span, ...]:
    """`n` elements in `parts` consecutive spans of whole units, as even as possible, earlier ones larger.

    `n` must be a multiple of `unit`.
    """
    units = n // unit
    sizes = [unit * (units // parts + (part < units % parts)) for part in range(parts)]
    return tuple(Span(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds of the model `whole`; spans count heads, columns or tokens of the whole."""

    whole: ModelSpec
    rank: int
    ranks: int
    heads: Span
    kv_heads: Span
    ff: Span
    experts: Span | None  # held experts, and which of their columns; None: a model without
    expert_ff: Span | None
    vocab: Span
    columns: Span  # of the model dim: the output columns of the O projection in its column form
    widest_heads: int  # the most that any rank has of these
    widest_vocab: int
    widest_columns: int

    @property
    def local(self) -> ModelSpec:
        """The spec of a model as narrow as this rank's part, with the whole model dim and vocabulary."""
        experts = self.whole.experts
        if experts is not None and self.expert_ff is not None:
            experts = replace(experts, d_ff=len(self.expert_ff))
        return replace(
            self.whole, n_heads=len(self.heads), n_kv_heads=len(self.kv_heads), d_ff=len(self.ff), experts=experts
        )

    @property
    def holds_residual(self) -> bool:
        """Whether this rank's partial sums carry the residual stream and the biases, so that they count once."""
        return self.rank == 0


def shard_of(spec: ModelSpec, rank: int, ranks: int, *, expert_parallel: bool = False) -> Shard:
    """The part of `spec` that rank `rank` of `ranks` holds; with `expert_parallel` whole experts.

    Raises `ConfigError` if there are too many ranks, or no experts to share out.
    """
    most = min(spec.n_heads, spec.d_ff, spec.d_model, spec.vocab_size)
    held = expert_ff = None
    if spec.experts is not None:
        n_experts, width = spec.experts.n_experts, spec.experts.d_ff
        most = min(most, n_experts if expert_parallel else width)
        held, expert_ff = Span(0, n_experts), Span(0, width)
    elif expert_parallel:
        raise ConfigError(f"expert_parallel is on, but {spec.name} has no experts; drop it.")
    if ranks > most:
        raise ConfigError(
            f"tensor_parallel_size is {ranks}, but {spec.name} can be split into {most} parts at most; lower it."
        )
    if spec.experts is not None and expert_parallel:
        held = partition(spec.experts.n_experts, ranks)[rank]
    elif spec.experts is not None:
        expert_ff = _widths(spec.experts.d_ff, ranks)[rank]
    heads = _heads(spec, ranks)
    vocab, columns = partition(spec.vocab_size, ranks), partition(spec.d_model, ranks)
    return Shard(
        whole=spec,
        rank=rank,
        ranks=ranks,
        heads=heads[rank][0],
        kv_heads=heads[rank][1],
        ff=_widths(spec.d_ff, ranks)[rank],
        experts=held,
        expert_ff=expert_ff,
        vocab=vocab[rank],
        columns=columns[rank],
        widest_heads=max(len(own) for own, _ in heads),
        widest_vocab=max(map(len, vocab)),
        widest_columns=max(map(len, columns)),
    )


def _widths(d_ff: int, ranks: int) -> tuple[Span, ...]:
    whole_units = d_ff % WIDTH_UNIT == 0 and d_ff // WIDTH_UNIT >= ranks
    return partition(d_ff, ranks, WIDTH_UNIT if whole_units else 1)


def _heads(spec: ModelSpec, ranks: int) -> list[tuple[Span, Span]]:
    """(query heads, KV heads) of each rank: whole groups, or a part of one group with a copy of its KV head."""
    group = spec.n_heads // spec.n_kv_heads
    if spec.n_kv_heads >= ranks:
        return [(kv.times(group), kv) for kv in partition(spec.n_kv_heads, ranks)]
    found: list[tuple[Span, Span]] = []
    for kv_head, sharing in enumerate(partition(ranks, spec.n_kv_heads)):
        if len(sharing) > group:
            raise ConfigError(
                f"tensor_parallel_size is {ranks}, but {spec.name} has {group} query heads for each of its "
                f"{spec.n_kv_heads} KV heads, so {spec.n_heads} ranks at most; lower it."
            )
        for part in partition(group, len(sharing)):
            first = kv_head * group
            found.append((Span(first + part.start, first + part.stop), Span(kv_head, kv_head + 1)))
    return found
