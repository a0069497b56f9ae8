"""What an engine did while a client in the same process put load on it: its work against the bound, and its energy.

The offline benchmarks drive the engine themselves; this one only reads its counters, before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from nanoflow.bench.bounds import bound_of_work
from nanoflow.bench.load import LoadRecord
from nanoflow.bench.numbers import energy_of
from nanoflow.bench.result import Bound, Energy
from nanoflow.bench.session import Meter
from nanoflow.core.hardware import MachineRates
from nanoflow.engine.build import Engine

Reading: TypeAlias = tuple[tuple[Bound, ...], Energy | None]


@dataclass(frozen=True)
class Metered:
    """An engine with the rates of one of its devices."""

    engine: Engine
    rates: MachineRates

    @property
    def devices(self) -> int:
        return self.engine.devices

    def start(self) -> Callable[[LoadRecord], Reading]:
        """Begin now; call the result when the load has ended. It gives no bound where nothing was computed."""
        meter = Meter(self.engine)

        def read(record: LoadRecord) -> Reading:
            elapsed_s, work, energy_j = time.monotonic() - meter.started_s, meter.work(), meter.energy_j()
            n_tokens = record.prompt_tokens + record.output_tokens
            energy = energy_of(energy_j, elapsed_s, n_tokens, record.output_tokens)
            if not work.iterations:
                return (), energy
            return (bound_of_work(self.rates, self.devices, elapsed_s, work, n_tokens),), energy

        return read
