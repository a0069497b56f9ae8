"""An analysis as plain values, for JSON and for tables: times in ms, throughput a device, energy above idle in joules.

The one place that decides what `nanoflow analyze` reports, so that its JSON, its table and its documentation agree.
"""

from __future__ import annotations

import math
from typing import Any

from nanoflow.analysis.bound import energy_j
from nanoflow.analysis.cost import OpCost, total
from nanoflow.analysis.serving import Analysis, Group

MS = 1e3


def describe(group: Group, analysis: Analysis) -> dict[str, Any]:
    """Rates, batch, the paper's formulas, the iteration's floors and every operation's costs."""
    rates = group.rates
    ops = {
        str(op): {
            **_work(cost),
            "energy_j": energy_j(cost.flops, cost.mem_bytes, rates),
            "floors_ms": {str(limit): MS * s for limit, s in analysis.op_floors[op].by_limit.items()},
        }
        for op, cost in analysis.costs.items()
    }
    batch = vars(analysis.batch) | {
        "dense_batch": analysis.batch.n_tokens,
        "limited_by_memory": analysis.limited_by_memory_size,
    }
    return {
        "rates": rates.to_dict(),
        "batch": batch,
        "paper": _paper(group, analysis),
        "iteration": _iteration(group, analysis),
        "ops": ops,
    }


def _work(cost: OpCost) -> dict[str, float]:
    return {"flops": cost.flops, "mem_bytes": cost.mem_bytes, "wire_bytes": cost.wire_bytes}


def _paper(group: Group, analysis: Analysis) -> dict[str, Any]:
    """The closed formulas; compute-bound from the batch at which T_R is 1, since T_R falls as 1 / batch."""
    paper = analysis.paper
    return {
        "t_compute_ms": MS * paper.compute_s,
        "t_mem_ms": MS * paper.mem_s,
        "t_r": paper.ratio,
        "bound": "compute" if paper.ratio < 1 else "memory",
        "compute_bound_from_tokens": math.floor(paper.ratio * analysis.batch.n_tokens) + 1,
        "optimal_tokens_per_s_per_gpu": paper.optimal_tokens_per_s / group.devices,
    }


def _iteration(group: Group, analysis: Analysis) -> dict[str, Any]:
    """The sums over all operations and the floors under them; energy is `None` where the device's is unknown."""
    whole = total(analysis.costs.values())
    energy = energy_j(whole.flops, whole.mem_bytes, group.rates)
    return {
        **_work(whole),
        "energy_j": energy,
        "energy_mj_per_token": None if energy is None else MS * energy / analysis.batch.n_tokens,
        "floors_ms": {str(limit): MS * s for limit, s in analysis.floors.by_limit.items()},
        "bound": str(analysis.floors.limit),
        "tokens_per_s_per_gpu": analysis.tokens_per_s / group.devices,
    }
