"""Launches repeated on CUDA lanes, side by side and back to back: the GPU's form of `profiling.loops`.

Each lane replays a recording of some launches, always with the next ones queued, so that neither Python nor launch gaps
count and the card reaches the clock that its power limit allows. A replay lies between two events of its own, so a host
that is late leaves a gap between replays, not a longer one; a pair is judged by the part in which both lanes were busy.

With several ranks, a collective's recording holds as many launches on all of them, and is replayed equally often: a
rank may be ahead by what it has queued, and at the end all catch up with the one that is farthest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanoflow.device.cuda import CudaDevice, CudaLane
from nanoflow.device.power import TickedPower
from nanoflow.device.replay import Recording, record
from nanoflow.profiling.loops import WARM_UP, Largest, Loop, Timing, timing_of

GRAPH_SECONDS = 2e-3
QUEUED = 8
"""Replays ahead of the card: reading its energy counter takes the host some milliseconds."""

_LOOK_AGAIN_S = 50e-6


@dataclass
class _Player:
    """One lane with its recording (`joint`: of collectives), and the events at both ends of its replays."""

    lane: CudaLane
    recording: Recording
    joint: bool
    begins: list[torch.cuda.Event] = field(default_factory=list)
    ends: list[torch.cuda.Event] = field(default_factory=list)

    def play(self) -> None:
        if len(self.ends) >= QUEUED:
            self.ends[-QUEUED].synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.lane.stream):
            begin.record()
            self.recording.replay()
            end.record()
        self.begins.append(begin)
        self.ends.append(end)


def run_cuda_loops(
    device: CudaDevice, loops: Sequence[Loop], seconds: float, least: int, largest: Largest | None = None
) -> list[Timing]:
    """See `profiling.loops.run_loops`; `least` counts replays of about 2 ms. Energy needs about half a second.

    With `largest`, every rank must call it alike; the times are this rank's own.
    """
    device.open_lanes([(f"loop{index}", loop.share) for index, loop in enumerate(loops)])
    players = [_record(lane, loop, largest) for lane, loop in zip(device.lanes, loops, strict=True)]
    torch.cuda.synchronize(device.torch_device)
    if largest is not None:
        largest([0])  # all ranks are here
    start = torch.cuda.Event(enable_timing=True)
    start.record(device.main)
    for player in players:
        player.lane.stream.wait_event(start)
    power, began = TickedPower(device.energy_j), time.perf_counter()
    while time.perf_counter() - began < seconds or min(len(player.ends) for player in players) < least:
        _feed(players)
        power.poll()
    if largest is not None:
        _catch_up(players, largest)
    torch.cuda.synchronize(device.torch_device)
    spans = [_spans(player, start) for player in players]
    common = max(one[0][1] for one in spans), min(one[-1][1] for one in spans)
    return [
        timing_of([s for s in one if s[0] >= common[0] and s[1] <= common[1]] or one, power.watts(), player.recording.n)
        for one, player in zip(spans, players, strict=True)
    ]


def _feed(players: Sequence[_Player]) -> None:
    """A replay for every lane with room in its queue, the emptiest first; a slow lane holds no other one up."""
    hungry = [player for player in sorted(players, key=_unplayed) if _unplayed(player) < QUEUED]
    for player in hungry:
        player.play()
    if not hungry:
        time.sleep(_LOOK_AGAIN_S)


def _catch_up(players: Sequence[_Player], largest: Largest) -> None:
    """Replay collectives as often as the rank that has replayed them most."""
    wanted = largest([len(player.ends) if player.joint else 0 for player in players])
    for player, count in zip(players, wanted, strict=True):
        while len(player.ends) < count:
            player.play()


def _unplayed(player: _Player) -> int:
    """How many replays are still queued, at most `QUEUED`."""
    return sum(not event.query() for event in player.ends[-QUEUED:])


def _spans(player: _Player, start: torch.cuda.Event) -> list[tuple[float, float]]:
    pairs = zip(player.begins, player.ends, strict=True)
    return [(start.elapsed_time(begin) / 1e3, start.elapsed_time(end) / 1e3) for begin, end in pairs]


def _record(lane: CudaLane, loop: Loop, largest: Largest | None) -> _Player:
    """Warm up, and record as many launches as fill `GRAPH_SECONDS`."""
    for k in range(WARM_UP):
        lane.run(loop.step, k)

    def settle(n: int) -> int:
        return largest([n])[0] if loop.joint and largest is not None else n

    return _Player(lane, record(lambda k: lane.run(loop.step, k), lane.stream, GRAPH_SECONDS, settle), loop.joint)
