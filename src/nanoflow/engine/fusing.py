"""Contenders whose all-reduces norm their rows as well: one kernel instead of two, where measuring says that it pays.

A profile times all-reduces without the norm that follows, so no search can tell. The two pipelines that matter most
are tried in these forms beside themselves, and the better forms go on to verification, where they have to win like any
other. Trying them has a part of verification's time; forms that it does not suffice for are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nanoflow.core.log import get_logger
from nanoflow.core.ops import Op, Resource
from nanoflow.distributed.reduce_norm import one_shot_limit
from nanoflow.engine.verification import SEQUENTIAL, Contender, Measure
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)

FUSED = (Op.O_REDUCE, Op.FFN_REDUCE)
"""All-reduces of the residual stream that a norm follows."""

ONE_SHOT = "one_shot_norm"
TURNS = 2
"""How often a form is tried, in turn with the others; its least time counts."""

TRIAL_TIME = 0.3
"""Part of verification's time."""

MARGIN = 0.03
"""A form that was slower than its base by more than this is not verified: both were measured within seconds."""

VECTOR_BYTES = 16
"""Rows are moved by so many bytes."""


def fused_forms(contenders: Sequence[Contender], names: Sequence[str], ranks: int, row_bytes: int) -> list[Contender]:
    """The sequential contender and the one of overlapped network that is predicted to be fastest, with all-reduces by
    each of `names`; both by the first name first.

    `row_bytes` are those of a row of the residual stream. A form that would run the same kernels as another is left
    out. Predicted is what its base is: the profile knows no more.
    """
    if row_bytes % VECTOR_BYTES:
        return []
    bases = list(_bases(contenders))
    forms = []
    for name in names:
        for base in bases:
            rows = [nano.stop - nano.start for nano in base.pipeline.nano_ops if nano.op in FUSED]
            least_bytes = min(rows, default=0) * row_bytes
            if rows and not (name == ONE_SHOT and least_bytes > one_shot_limit(ranks)):
                forms.append(replace(base, pipeline=_fused(base.pipeline, name), form_of=base.name))
    return forms


def _bases(contenders: Sequence[Contender]) -> Iterator[Contender]:
    yield from (one for one in contenders if one.name == SEQUENTIAL)
    several = [one for one in contenders if Resource.NETWORK in one.pipeline.meta.get("overlaps", ())]
    yield from sorted(several, key=lambda one: one.predicted_us)[:1]


def _fused(pipeline: Pipeline, name: str) -> Pipeline:
    nano_ops = tuple(replace(nano, variant=name) if nano.op in FUSED else nano for nano in pipeline.nano_ops)
    return replace(pipeline, name=f"{pipeline.name}-{name}", nano_ops=nano_ops)


def promising_forms(
    contenders: Sequence[Contender],
    forms: Sequence[Contender],
    measure: Measure,
    seconds: float,
    on_trial: Callable[[int, int, str], None] | None = None,
) -> list[Contender]:
    """For each base among `contenders` the form that was fastest when tried beside it, unless that was clearly slower.

    Forms are begun for at most `seconds`.
    """
    bases = [one for one in contenders if any(form.form_of == one.name for form in forms)]
    tried, deadline = [*bases, *forms], time.monotonic() + seconds
    times: dict[str, float] = {}
    for number in range(TURNS * len(tried)):
        one = tried[number % len(tried)]
        if one.form_of and time.monotonic() > deadline:
            continue
        if on_trial is not None:
            on_trial(number, TURNS * len(tried), one.name)
        times[one.name] = min(measure(one).iteration_us, times.get(one.name, float("inf")))
    if left_out := [form.name for form in forms if form.name not in times]:
        _log.warning("no time to try %s; a longer --verify-seconds gives them some", ", ".join(left_out))
    found = []
    for base in bases:
        own = [form for form in forms if form.form_of == base.name and form.name in times]
        best = min(own, key=lambda form: times[form.name], default=None)
        if best is not None and times[best.name] <= (1.0 + MARGIN) * times[base.name]:
            found.append(best)
    return found
