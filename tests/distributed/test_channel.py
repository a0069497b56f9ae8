"""Messages from rank 0: arrays come whole, slots are not written before they are read, a plan costs little."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from statistics import median

import numpy as np
import pytest

from nanoflow.core.batch import BatchPlan, SamplingPlan
from nanoflow.distributed import channel
from nanoflow.distributed.channel import SLOTS, Receiver, Sender, make_memory

N_READERS = 2


def test_the_sender_knows_who_is_behind_and_who_is_silent(ends: tuple[Sender, list[Receiver]]) -> None:
    sender, receivers = ends
    assert sender.behind() == []
    sender.send("one")
    for receiver in receivers:
        receiver.receive()
    assert sender.behind() == [0, 1], "they have it, and are not done with it"
    receivers[1].done()
    assert sender.behind() == [0]
    assert sender.silent(60.0) == [0, 1]
    receivers[0].beat()
    assert sender.silent(60.0) == [1]
    time.sleep(0.02)
    assert sender.silent(0.01) == [0, 1]


def plan_of(n_requests: int, n_pages: int) -> BatchPlan:
    """A decode batch of `n_requests` with page tables `n_pages` wide."""
    ints = np.arange(n_requests, dtype=np.int32)
    floats = np.ones(n_requests, dtype=np.float32)
    nothing = np.zeros(0, dtype=np.int32)
    sampling = SamplingPlan(
        ints, ints, floats, ints, floats, floats, ints.astype(np.int64), ints, nothing, nothing, np.zeros(0, np.float32)
    )
    pages = np.arange(n_requests * n_pages, dtype=np.int32).reshape(n_requests, n_pages)
    query_start = np.arange(n_requests + 1, dtype=np.int32)
    return BatchPlan(n_requests, n_requests, ints, ints, ints, ints, query_start, ints + 1, pages, sampling)


@pytest.fixture
def ends() -> Iterator[tuple[Sender, list[Receiver]]]:
    memory = make_memory()
    pairs = [Pipe() for _ in range(N_READERS)]
    sender = Sender(memory, [ours for ours, _ in pairs], lambda: None)
    yield sender, [Receiver(memory, theirs, number) for number, (_, theirs) in enumerate(pairs)]
    os.close(memory)
    for pair in pairs:
        for end in pair:
            end.close()


def test_every_reader_gets_its_own_copy(ends: tuple[Sender, list[Receiver]]) -> None:
    sender, receivers = ends
    sent = [plan_of(7, 5 + number) for number in range(3)]
    for plan in sent:
        sender.send(("launch", plan))
    for receiver in receivers:
        for plan in sent:
            kind, found = receiver.receive()
            assert kind == "launch"
            np.testing.assert_array_equal(found.page_table, plan.page_table)
            np.testing.assert_array_equal(found.sampling.keys, plan.sampling.keys)
            found.page_table[:] = 0  # neither shared nor read-only


def test_a_slot_waits_for_the_slowest_reader(ends: tuple[Sender, list[Receiver]]) -> None:
    sender, (quick, slow) = ends
    for number in range(SLOTS):
        sender.send(np.full(10, number))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (sender.send(np.full(10, SLOTS)), done.set()))
    thread.start()
    for number in range(SLOTS):
        assert quick.receive()[0] == number
    assert not done.wait(0.05), "the other has read nothing"
    assert slow.receive()[0] == 0
    assert done.wait(5)
    thread.join()
    assert [slow.receive()[0] for _ in range(SLOTS)] == list(range(1, SLOTS + 1))


def test_a_waiting_sender_hears_of_a_failure() -> None:
    def gone() -> None:
        raise RuntimeError("rank 1 is gone")

    memory = make_memory()
    ours, theirs = Pipe()
    sender = Sender(memory, [ours], gone)
    for _ in range(SLOTS):
        sender.send(1)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        sender.send(1)
    os.close(memory)
    ours.close()
    theirs.close()


def test_what_fits_no_slot_goes_through_the_pipe(
    ends: tuple[Sender, list[Receiver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SLOT_BYTES", 1000)
    sender, receivers = ends
    big = np.arange(2000)
    sender.send(big)
    for receiver in receivers:
        np.testing.assert_array_equal(receiver.receive(), big)


def test_a_thousand_requests_take_well_under_a_millisecond(ends: tuple[Sender, list[Receiver]]) -> None:
    sender, receivers = ends
    plan = plan_of(1000, 128)  # 2048 tokens each
    sending, receiving = [], []
    for _ in range(50):
        started = time.perf_counter()
        sender.send(("launch", plan))
        sending.append(time.perf_counter() - started)
        for receiver in receivers:
            started = time.perf_counter()
            receiver.receive()
            receiving.append(time.perf_counter() - started)
    sys.stdout.write(
        f"plan of 1000 requests: sent to 2 ranks in {median(sending) * 1e6:.0f} µs, "
        f"received in {median(receiving) * 1e6:.0f} µs\n"
    )
    assert min(sending) < 1e-3 and min(receiving) < 1e-3
