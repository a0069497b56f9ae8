"""How a run sends: how many at once, in which order, and with how much memory."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from pathlib import Path

import pytest

from nanoflow.batch.job import BatchJob
from nanoflow.batch.order import MIN_SHARED_TOKENS, ordered, prefix_key
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Prepared, Response
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.batch.survey import RepeatedIds, survey
from nanoflow.core.errors import QueueFullError
from tests.batch.scripted import IDENTITY, ScriptedResponder, answers, request, run_job, write_input


def job_of(folder: Path, lines: list[dict[str, object]]) -> JobPaths:
    return JobPaths.beside(write_input(folder / "in.jsonl", lines), folder / "out.jsonl")


def test_in_flight_counts_choices_and_is_kept_full(tmp_path: Path) -> None:
    lines = [request(str(i), f"p{i}", n=1 + i % 3) for i in range(200)]
    run_job(job_of(tmp_path, lines), responder := ScriptedResponder(0.005), in_flight=10, window_lines=16)
    assert responder.n_most in (9, 10)
    assert len(responder.sent) == 200


def test_a_request_larger_than_the_limit_runs_alone(tmp_path: Path) -> None:
    lines = [request(str(i), f"p{i}", n=8 if i == 3 else 1) for i in range(12)]
    run_job(job_of(tmp_path, lines), responder := ScriptedResponder(0.005), in_flight=4)
    assert responder.n_most == 8
    assert len(responder.sent) == 12


def test_windows_bound_what_is_prepared_ahead(tmp_path: Path) -> None:
    """With one answer still out, at most the window being sent and the next one are prepared."""

    class Counting(ScriptedResponder):
        most_ahead = 0

        async def answer(self, prepared: Prepared) -> Response:
            self.most_ahead = max(self.most_ahead, self.n_prepared - len(self.sent))
            return await super().answer(prepared)

    lines = [request(str(i), "x" * 10) for i in range(300)]
    run_job(job_of(tmp_path, lines), responder := Counting(), in_flight=1, window_lines=20)
    assert responder.most_ahead <= 40
    (tmp_path / "tokens").mkdir()
    run_job(job_of(tmp_path / "tokens", lines), responder := Counting(), in_flight=1, window_tokens=50)
    assert responder.most_ahead <= 10


def test_a_full_queue_is_asked_again(tmp_path: Path) -> None:
    class Full(ScriptedResponder):
        refused = 0

        async def answer(self, prepared: Prepared) -> Response:
            if self.refused < 30:
                self.refused += 1
                raise QueueFullError("full", retry_after_s=0.001)
            return await super().answer(prepared)

    paths = job_of(tmp_path, [request(str(i), "p") for i in range(20)])
    run_job(paths, responder := Full())
    assert responder.refused == 30
    assert len(answers(paths.output)) == 20


def test_cancelling_keeps_what_is_finished(tmp_path: Path) -> None:
    paths = job_of(tmp_path, [request(str(i), f"p{i}") for i in range(100)])

    async def scenario() -> int:
        job = BatchJob.open(paths, IDENTITY)
        running = asyncio.create_task(BatchRunner(job, ScriptedResponder(0.05), RunLimits(10)).run())
        while job.counts.done < 25:
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        done = job.counts.done
        job.close()
        return done

    done = asyncio.run(scenario())
    assert len(answers(paths.output)) == done < 100
    run_job(paths)
    assert len(answers(paths.output)) == 100


# --- order ---


def prepared(name: int, prompt: str, max_tokens: int) -> Prepared:
    return Prepared(name, str(name), prefix_key(map(ord, prompt)), len(prompt), max_tokens)


def test_prompts_that_share_a_prefix_are_neighbours() -> None:
    prefixes = [letter * (MIN_SHARED_TOKENS + 4) for letter in "abcde"]
    items = [prepared(i, "common start: " + prefixes[i % 5] + str(i), 8) for i in range(60)]
    random.Random(0).shuffle(items)
    order = [item.line % 5 for item in ordered(items)]
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes == 4
    assert sorted(item.line for item in ordered(items)) == list(range(60))


def test_without_shared_prefixes_long_answers_go_first() -> None:
    chance = random.Random(1)
    items = [prepared(i, f"{chance.random()}" * 3, chance.randrange(1, 500)) for i in range(50)]
    lengths = [item.max_output_tokens for item in ordered(items)]
    assert lengths == sorted(lengths, reverse=True)


def iterations(lengths: list[int], places: int) -> int:
    """How many iterations a continuous batch of so many places takes."""
    running: list[int] = []
    waiting, count = list(lengths), 0
    while waiting or running:
        while waiting and len(running) < places:
            running.append(waiting.pop(0))
        running = [left - 1 for left in running if left > 1]
        count += 1
    return count


def test_long_answers_first_end_the_job_sooner() -> None:
    chance = random.Random(2)
    items = [prepared(i, f"{chance.random()}", int(chance.lognormvariate(3, 1)) + 1) for i in range(400)]
    in_file_order = iterations([item.max_output_tokens for item in items], 64)
    in_our_order = iterations([item.max_output_tokens for item in ordered(items)], 64)
    longest = max(item.max_output_tokens for item in items)
    ideal = max(longest, sum(item.max_output_tokens for item in items) / 64)
    assert in_our_order < 1.1 * ideal < in_file_order


def test_keeping_the_order(tmp_path: Path) -> None:
    paths = job_of(tmp_path, [request(str(i), f"p{i}", max_tokens=i + 1) for i in range(30)])
    run_job(paths, kept := ScriptedResponder(), reorder=False)
    assert kept.sent == [str(i) for i in range(30)]


# --- the survey, and memory ---


def test_repeated_ids_over_many_buckets_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.batch.survey._BUCKET_BUFFER_BYTES", 24 * 4)
    ids = RepeatedIds()
    chance = random.Random(3)
    names = [str(chance.randrange(3000)) for _ in range(4000)]
    for line, name in enumerate(names, start=1):
        ids.add(name, line)
    assert sorted(ids.repeated()) == [i + 1 for i in range(4000) if names[i] in names[:i]]
    ids.close()


class Forgetful(ScriptedResponder):
    """Keeps nothing of what it was asked."""

    async def answer(self, prepared: Prepared) -> Response:
        self.sent.clear()
        return await super().answer(prepared)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the lines, the same peak but for a bit a line; the survey's buffers are made small to see it."""
    monkeypatch.setattr("nanoflow.batch.survey._BUCKET_BUFFER_BYTES", 24 * 8)
    monkeypatch.setattr("nanoflow.batch.survey._BLOCK_BYTES", 1 << 12)
    peaks = []
    for n in (1_500, 4_500):
        folder = tmp_path / str(n)
        folder.mkdir()
        paths = job_of(folder, [request(str(i), f"prompt {i}") for i in range(n)])
        tracemalloc.start()
        run_job(paths, Forgetful(), in_flight=32, window_lines=128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(answers(paths.output)) == n
    assert peaks[1] < peaks[0] + (1 << 17)


def test_survey_counts(tmp_path: Path) -> None:
    told: list[int] = []
    lines = [request(str(i % 41_000), "p") for i in range(41_005)]
    found = survey(write_input(tmp_path / "in.jsonl", [*lines, b"", b"{"]), told.append)
    assert (found.n_lines, found.n_requests) == (41_007, 41_006)
    assert found.repeated == [41_001, 41_002, 41_003, 41_004, 41_005]
    assert found.n_bytes == (tmp_path / "in.jsonl").stat().st_size
    assert told == [20_000, 40_000]
