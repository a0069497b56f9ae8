"""When requests arrive: all at once, at random (Poisson), in bursts (gamma), or as a trace recorded it. Seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow.core.errors import ConfigError

AT_ONCE, POISSON, GAMMA, TRACE = "at once", "poisson", "gamma", "trace"
ARRIVALS = (POISSON, GAMMA, TRACE)
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arrivals:
    """`rate_rps` requests a second on average; a trace keeps its own rate where none is given.

    `burstiness` is the squared coefficient of variation of the gaps between gamma arrivals: 1 is Poisson, more is
    burstier. Raises `ConfigError` for values that no process has.
    """

    kind: str = AT_ONCE
    rate_rps: float | None = None
    burstiness: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in (AT_ONCE, *ARRIVALS):
            raise ConfigError(f"arrivals must be one of {', '.join(ARRIVALS)}, not {self.kind!r}.")
        if self.kind in (POISSON, GAMMA) and self.rate_rps is None:
            raise ConfigError(f"{self.kind} arrivals need a rate in requests a second; give one.")
        if self.rate_rps is not None and not self.rate_rps > 0:
            raise ConfigError(f"the request rate must be above 0, not {self.rate_rps}.")
        if not self.burstiness > 0:
            raise ConfigError(f"burstiness must be above 0 (1 is Poisson), not {self.burstiness}.")

    def times(self, n: int, seed: int, recorded: Seconds | None = None) -> Seconds:
        """Arrival of each of `n` requests in seconds after the first one, rising.

        `recorded` are a trace's own; they are stretched so that their mean rate is `rate_rps` where that is given.
        """
        if self.kind == AT_ONCE:
            return np.zeros(n)
        if self.kind == TRACE:
            return self._recorded(n, recorded)
        assert self.rate_rps is not None
        rng = np.random.default_rng([seed, 0xA771])
        shape = 1.0 if self.kind == POISSON else 1.0 / self.burstiness
        gaps = rng.gamma(shape, 1.0 / (self.rate_rps * shape), size=n)
        times: Seconds = np.cumsum(gaps) - gaps[0]
        return times

    def _recorded(self, n: int, recorded: Seconds | None) -> Seconds:
        if recorded is None:
            raise ConfigError(
                "the workload records no arrivals; give a trace with arrival_s or arrival_ms, or poisson."
            )
        if len(recorded) < n:
            raise ConfigError(f"the trace records {len(recorded)} arrivals, {n} are wanted; ask for fewer requests.")
        times: Seconds = recorded[:n] - recorded[0]
        if self.rate_rps is not None and times[-1] > 0:
            times = times * ((n - 1) / self.rate_rps / times[-1])
        return times
