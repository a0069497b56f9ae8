"""A thin hold on HiGHS: columns and rows by name of their index, a start, limits, progress, and an honest outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoflow.core.errors import ConfigError, PipelineError

INF = math.inf


@dataclass(frozen=True)
class Progress:
    """Where a solve stands: best period found, proven lower bound (both µs), and seconds since it began."""

    stage: str
    incumbent_us: float
    bound_us: float
    seconds: float
    note: str = ""

    @property
    def gap(self) -> float:
        """(incumbent − bound) / incumbent; 1 before there is an incumbent."""
        if not math.isfinite(self.incumbent_us) or self.incumbent_us <= 0:
            return 1.0
        return max(0.0, (self.incumbent_us - self.bound_us) / self.incumbent_us)


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """Values of the columns (None: nothing found in time), objective, proven bound, and whether it is optimal."""

    values: Sequence[float] | None
    objective: float
    bound: float
    optimal: bool
    seconds: float


@dataclass
class Milp:
    """Minimise a linear objective. Columns and rows are added one by one, then solved once."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, dict[int, float]]] = field(default_factory=list)

    def add_var(self, lower: float = 0.0, upper: float = INF, cost: float = 0.0, integer: bool = False) -> int:
        """A new column; returns its index."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.cost.append(cost)
        self.integer.append(integer)
        return len(self.lower) - 1

    def add_binary(self) -> int:
        return self.add_var(0.0, 1.0, integer=True)

    def add_row(self, terms: Mapping[int, float], lower: float = -INF, upper: float = INF) -> None:
        """lower ≤ Σ terms ≤ upper."""
        self.rows.append((lower, upper, dict(terms)))

    def solve(
        self,
        *,
        seconds: float = 60.0,
        nodes: int | None = None,
        threads: int = 1,
        start: Sequence[float] | None = None,
        relax: bool = False,
        stage: str = "",
        on_progress: OnProgress | None = None,
    ) -> Outcome:
        """Solve. Raises `PipelineError` if the model has no solution at all (`relax` drops integrality)."""
        highs = _new_highs()
        import highspy

        highs.passModel(self._lp(highspy, relax))
        highs.resetGlobalScheduler(True)  # the pool keeps the size of the first solve otherwise
        highs.setOptionValue("threads", threads)
        highs.setOptionValue("time_limit", max(0.1, seconds))
        highs.setOptionValue("mip_rel_gap", 1e-7)
        highs.setOptionValue("mip_feasibility_tolerance", 1e-9)
        highs.setOptionValue("primal_feasibility_tolerance", 1e-9)
        if nodes is not None:
            highs.setOptionValue("mip_max_nodes", nodes)
        if start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = list(start)
            highs.setSolution(solution)
        began = time.monotonic()
        if on_progress is not None:
            _report(highs, stage, began, on_progress)
        highs.run()
        return self._outcome(highs, highspy, time.monotonic() - began, relax)

    def _outcome(self, highs: Any, highspy: Any, seconds: float, relax: bool) -> Outcome:
        status = highs.getModelStatus()
        kinds = highspy.HighsModelStatus
        if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
            raise PipelineError("no pipeline satisfies the given sizes, shares and dependencies; allow more of them.")
        info = highs.getInfo()
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        integral = any(self.integer) and not relax
        bound = info.mip_dual_bound if integral else info.objective_function_value
        return Outcome(
            values=list(highs.getSolution().col_value) if found else None,
            objective=info.objective_function_value if found else INF,
            bound=bound,
            optimal=status == kinds.kOptimal,
            seconds=seconds,
        )

    def _lp(self, highspy: Any, relax: bool) -> Any:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.lower), len(self.rows)
        lp.col_lower_, lp.col_upper_, lp.col_cost_ = self.lower, self.upper, self.cost
        lp.row_lower_ = [row[0] for row in self.rows]
        lp.row_upper_ = [row[1] for row in self.rows]
        starts, index, value = [0], [], []
        for _, _, terms in self.rows:
            index += list(terms)
            value += list(terms.values())
            starts.append(len(index))
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = starts, index, value
        if any(self.integer) and not relax:
            kinds = highspy.HighsVarType
            lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in self.integer]
        return lp


def _new_highs() -> Any:
    try:
        import highspy
    except ImportError as error:
        raise ConfigError("the search needs HiGHS; install it with: pip install 'nanoflow-serve[search]'.") from error
    solver: Any = highspy.Highs  # highspy carries no annotations
    highs = solver()
    highs.setOptionValue("output_flag", True)  # callbacks need it; nothing reaches the console
    highs.setOptionValue("log_to_console", False)
    highs.setOptionValue("random_seed", 0)
    return highs


def _report(highs: Any, stage: str, began: float, on_progress: OnProgress) -> None:
    """Pass HiGHS's own progress on."""

    def tell(event: Any) -> None:
        out = event.data_out
        on_progress(Progress(stage, out.mip_primal_bound, out.mip_dual_bound, time.monotonic() - began))

    highs.cbMipLogging += tell
    highs.cbMipImprovingSolution += tell
