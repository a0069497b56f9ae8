"""Ranks of one model in one process, with tiers below the device: each rank is a hash model with pages of its own.

Every rank's model computes every batch, so a page that is missing, stale or in the wrong place on any one of them shows
in its tokens.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoflow.analysis.work import WorkCounter, iteration_work
from nanoflow.core.batch import BatchPlan
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import RankFailedError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.presets import PRESETS
from nanoflow.engine.caching import tiers_below
from nanoflow.engine.core import EngineCore, InFlightBatch
from nanoflow.engine.rank_link import GroupLink
from nanoflow.engine.scheduler import Scheduler, SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.rank_tiers import RankTiers
from nanoflow.kvcache.ranked_mover import RankedMover
from tests.engine.hash_model import EOS, Done, HashModel, HashMover, expected_output, make_sequence

VOCAB, SLOT, RANKS = 23, 4096, 3
LIMITS = SchedulerLimits(dense_batch=32, max_running=6, max_model_len=80, page_tokens=4, n_pages=24, eos_ids=(EOS,))
SLOW = MachineRates("slow", "float32", flops_per_s=1.0, mem_bytes_per_s=1.0, measured=True)
LAYOUT = "test"


class LocalGroup:
    """Stands in for `RankGroup`: ranks 1, 2, … in this process. Messages are pickled, as between processes."""

    def __init__(self, models: list[HashModel], movers: list[PageMover], answer_after_s: float = 0.0) -> None:
        self.models, self.movers = models, movers
        self.pids = list(range(1, len(movers)))
        self.posted: list[tuple[int, str, tuple[Any, ...]]] = []
        self.messages: list[tuple[str, int]] = []  # kind, and the commands that came with it
        self.failure: RankFailedError | None = None
        self.on_answer: Callable[[int, int, Any], None] = print
        self.on_end: Callable[[], None] = print
        self._answer_after_s = answer_after_s
        self.tiers = [RankTiers(rank, self.movers[rank], self._answerer(rank), self._fail) for rank in self.pids]

    def _answerer(self, rank: int) -> Callable[[int, Any], None]:
        def answer(number: int, value: Any) -> None:
            time.sleep(self._answer_after_s * (rank % 2))
            self.on_answer(rank, number, pickle.loads(pickle.dumps(value)))

        return answer

    def _fail(self, error: BaseException) -> None:
        raise error

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def send(self, kind: str, *values: Any) -> None:
        self.check()
        posted, self.posted = self.posted, []
        self.messages.append((kind, len(posted)))
        for tiers in self.tiers:
            tiers.carry_out(pickle.loads(pickle.dumps(posted)))
        if kind == "launch":
            self.said = [model.launch(*values).result().tokens for model in self.models[1:]]

    def lose(self) -> None:
        """As if a process had been killed."""
        self.failure = RankFailedError("rank 1 was killed; all ranks were stopped.")
        self.on_end()

    def launch(self, plan: BatchPlan) -> Done:
        self.send("launch", plan)
        done = self.models[0].launch(plan)
        assert all((done.result().tokens == tokens).all() for tokens in self.said), "ranks disagree"
        return done

    def close(self) -> None:
        for tiers in self.tiers:
            tiers.close()


class Bench:
    """An engine core over such a group, with tiers of `dram` and `ssd` pages."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        dram: int = 64,
        ssd: int = 200,
        limits: SchedulerLimits = LIMITS,
        asynchronous: bool = True,
        answer_after_s: float = 0.0,
    ) -> None:
        models = [HashModel(limits, 2 * limits.max_running, VOCAB) for _ in range(RANKS)]
        self.movers = [HashMover(model) for model in models]
        self.group = LocalGroup(models, list(self.movers), answer_after_s)
        self.link = GroupLink(self.group)  # type: ignore[arg-type]
        mover = RankedMover(self.movers[0], self.link)
        options: dict[str, Any] = {"kv_dram_bytes": RANKS * SLOT * dram, "tensor_parallel_size": RANKS}
        if folder is not None:
            options |= {"kv_ssd_path": str(folder), "kv_ssd_bytes": RANKS * SLOT * ssd}
        config = EngineConfig.from_options(model="test", device="cpu", **options)
        work = iteration_work(PRESETS["smollm2"], "float32")
        lower = tiers_below(config, mover, work, SLOW, LAYOUT, self.link)
        self.scheduler = Scheduler(limits, mover=mover, lower=lower)
        self.core = EngineCore(self.scheduler, self.group, WorkCounter(work), asynchronous=asynchronous)

    def run(self, *sequences: Sequence, in_flight: InFlightBatch | None = None) -> int:
        """Run to the end, from the batch `in_flight` on; returns the prompt tokens computed."""
        before = self.scheduler.prompt_tokens
        for sequence in sequences:
            self.core.add(sequence)
        deadline = time.monotonic() + 20
        while self.core.has_work or in_flight is not None:
            in_flight = self.core.step(in_flight)
            assert time.monotonic() < deadline, "requests starve"
        assert self.scheduler.pool.n_used == 0, "pages leaked"
        check(*sequences)
        return self.scheduler.prompt_tokens - before

    def write_all(self) -> None:
        deadline = time.monotonic() + 5
        while self.scheduler.residency.has_writes:
            self.core.step(None)
            assert time.monotonic() < deadline

    def close(self) -> None:
        self.scheduler.residency.close()
        self.group.close()

    @property
    def hits(self) -> dict[str, int]:
        return {tier: tokens for tier, tokens in self.core.stats().kv_hit_tokens.items() if tokens}


def request(number: int, length: int = 41, n_out: int = 3) -> Sequence:
    prompt = [1 + (number + 7 * k) % (VOCAB - 1) for k in range(length)]
    return make_sequence(str(number), prompt, n_out, ignore_eos=True)


def check(*sequences: Sequence) -> None:
    """Those that were not aborted say what they must."""
    for sequence in sequences:
        if sequence.finish_reason != "abort":
            asked = sequence.request
            wanted = expected_output(list(asked.prompt_token_ids), asked.max_tokens, VOCAB, ignore_eos=True)
            assert sequence.output_ids == wanted
