"""What one rank does while a model is profiled and tuned: it times what rank 0 asks for, together with all others.

Rank 0 has one as well, whether there are other ranks or not (`engine/team.py`). Everything that talks to other ranks is
done by all of them in the same order, because each gets the same commands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.engine.placing import Rank, join
from nanoflow.engine.rank_serving import Executors
from nanoflow.engine.resolve import open_device
from nanoflow.engine.stage import Stage, open_stage
from nanoflow.engine.workbench import Workbench
from nanoflow.models.decoder import DecoderWeights
from nanoflow.models.sharded import HEAD_LANE
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.profiling.joining import GATHERERS, REDUCERS, Wires, variants_of
from nanoflow.profiling.loops import Loop, Timing, run_loops
from nanoflow.profiling.subject import Subject
from nanoflow.profiling.tasks import Part

_log = get_logger(__name__)


class RankBench:
    """Implements `rank_serving.RankFollower`. With a `meeting_place` it joins the other ranks first."""

    def __init__(self, bench: Workbench, meeting_place: Path | None = None, number: int = 0) -> None:
        self.bench = bench
        self.rank: Rank | None = None
        if meeting_place is not None:
            self.rank = join(bench.config, bench.files, bench.device, None, meeting_place, number)
        self._weights: DecoderWeights | None = None
        self._subjects: dict[str, Subject] = {}
        self._stage: Stage | None = None
        self._executors = Executors()
        self._commands: dict[str, Callable[..., Any]] = {
            "load": self.load,
            "subject": self.subject,
            "time": self.time,
            "drop": self.drop,
            "stage": self.stage,
            "prepare": self.prepare,
            "launch": self._executors.launch,
            "launch_layers": self._executors.launch_layers,
        }

    def command(self, kind: str, *values: Any) -> Any:
        """See `RankFollower.command`."""
        found: Any = self._commands[kind](*values)
        return found if kind == "launch" else None

    def load(self, show_progress: bool = False) -> None:
        """Read the model's own weights, to measure with these."""
        self._weights = self.bench.load(show_progress=show_progress)

    def subject(self, name: str, largest: int) -> Subject:
        """Make what is profiled for kernels `name`, up to `largest` tokens; earlier ones go."""
        self._subjects.clear()
        made = self.bench.subject(name, largest, self._weights, self._wires())
        self._subjects[name] = made
        return made

    def time(self, name: str, parts: Sequence[Part], seconds: float) -> list[Timing]:
        """Time `parts`, all at once, on the subject of kernels `name`: the slowest rank's times."""
        subject, largest = self._subjects[name], None if self.rank is None else self.rank.groups.largest
        loops = [
            Loop(
                part.share,
                subject.step(part.op, part.tokens, part.variant),
                joint=RESOURCE[part.op] is Resource.NETWORK,
            )
            for part in parts
        ]
        return run_loops(self.bench.device, loops, seconds, largest=largest)

    def drop(self) -> None:
        """Free what was profiled, and stop the lanes that it ran on."""
        self._subjects.clear()
        self.bench.device.close()
        if self.bench.device.kind == "cuda":
            torch.cuda.empty_cache()

    def stage(self) -> Stage:
        """Make the stage that contenders run on."""
        assert self._weights is not None, "loaded before"
        config, number = self.bench.config, self.bench.number
        self._stage = open_stage(self.bench, self._weights, lambda: open_device(config, number), self.rank)
        return self._stage

    def prepare(self, pipeline_json: str) -> None:
        """Make the executor of another pipeline on the stage."""
        assert self._stage is not None, "made before"
        self._executors.add(self._stage.executor(Pipeline.from_json(pipeline_json)))

    def close(self) -> None:
        """Stop all lanes and leave the others. Idempotent."""
        if self._stage is not None:
            self._stage.close()
        self.bench.device.close()
        if self.rank is not None:
            self.rank.close()

    def _wires(self) -> Wires | None:
        """Collectives by every implementation that this device has."""
        if self.rank is None:
            return None
        names = {*REDUCERS, *GATHERERS} if self.bench.device.kind == "cuda" else set()
        try:
            opened = self.rank.collectives([HEAD_LANE], names)
        except ConfigError as error:
            _log.warning("only the library's collectives are measured: %s", error)
            names = set()
            opened = self.rank.collectives([HEAD_LANE], names)
        return Wires(*opened, variants_of(names))
