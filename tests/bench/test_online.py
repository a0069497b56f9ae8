"""The online benchmark reports a stub's known latency, finds the rate that is sustained, and aborts what is late."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from nanoflow.bench.arrivals import Arrivals
from nanoflow.bench.endpoint import Endpoint
from nanoflow.bench.load import OK, UNFINISHED, Heard, RequestError, prepare_all, run_load
from nanoflow.bench.offline import OfflineOptions
from nanoflow.bench.online import LEAST_REQUESTS, OnlineOptions, Sweep, run_numbers
from nanoflow.bench.online_runs import ended_early, offline_endpoint, online_endpoint, online_in_process
from nanoflow.bench.overhead import stub_endpoint
from nanoflow.bench.result import BenchKind, ModelInfo, Run, Series, parse_result
from nanoflow.bench.show import lines_of, rate_lines
from nanoflow.bench.stub import Schedule, StubServer, StubTarget
from nanoflow.bench.sustained import highest_sustained, judged
from nanoflow.bench.workloads import make_requests
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError

N_OUT = 11
SLOW = Schedule(ttft_s=0.3, tpot_s=0.04)
OPTIONS = OnlineOptions(workload=f"16/{N_OUT}", rates=(10.0,), seconds=1.5, warmup=2, drain_s=5.0)


def test_a_stub_of_known_latency_is_reported_within_five_percent() -> None:
    async def measure() -> Sweep:
        async with stub_endpoint(SLOW) as endpoint:
            sweep = Sweep(endpoint, OPTIONS, 1000)
            assert await sweep.run() == {"highest_sustained_rate_rps": 10.0}
            return sweep

    (series,) = asyncio.run(measure()).series
    numbers = series.numbers
    assert numbers["requests"] == 15 and numbers["failed_requests"] == 0 and numbers["sustained"] == 1
    assert numbers["ttft_p50_s"] == pytest.approx(0.3, rel=0.05)
    assert numbers["time_per_output_token_p50_s"] == pytest.approx(0.04, rel=0.05)
    assert numbers["latency_p50_s"] == pytest.approx(SLOW.latency_s(N_OUT), rel=0.05)
    assert numbers["normalised_latency_p50_s"] == pytest.approx(SLOW.latency_s(N_OUT) / N_OUT, rel=0.05)
    assert numbers["normalised_latency_mean_s"] >= SLOW.latency_s(N_OUT) / N_OUT
    assert numbers["goodput_rps"] == pytest.approx(numbers["offered_rps"])
    assert series.runs[0].requests["output_tokens"] == (N_OUT,) * 15


def test_a_whole_result_against_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    async def measure() -> str:
        server = await StubServer(Schedule(0.01, 0.001)).start()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop = asyncio.get_running_loop()
        model = ModelInfo("stub")
        options = replace(OPTIONS, rates=(30.0, 60.0), seconds=0.3)
        online = await loop.run_in_executor(None, online_endpoint, Endpoint(url), model, 1000, options)
        requests = make_requests(f"16/{N_OUT}", 8)
        few = OfflineOptions(runs=2, warmup=1)
        offline = await loop.run_in_executor(None, offline_endpoint, Endpoint(url), model, 1000, requests, few)
        server.close()
        assert (online.kind, offline.kind) == (BenchKind.ONLINE, BenchKind.OFFLINE)
        assert online.target == offline.target == f"{url}/v1"
        assert [series.rate_rps for series in online.series] == [30.0, 60.0]
        assert online.numbers["highest_sustained_rate_rps"] == 60.0
        assert online.client is not None and (online.client.added_median_us or 0) > 0
        assert [run.numbers["output_tokens"] for run in offline.series[0].runs] == [8 * N_OUT] * 2
        assert not online.notes and not offline.notes
        assert "".join(lines_of(offline))
        return online.to_json()

    result = parse_result(asyncio.run(measure()))
    text = "\n".join(lines_of(result))
    assert (
        "offered" in text
        and "normalised" in text
        and "client: adds median" in text
        and "highest_sustained_rate_rps: 60" in text
        and "sustained within 200 ms a token (mean normalised latency): at most 60 requests/s" in text
    )


def test_what_is_late_is_ended_and_counts_against_the_rate() -> None:
    requests = make_requests("4/50", 4, arrivals=Arrivals("poisson", 100.0))
    target = StubTarget(Schedule(0.01, 0.05))
    record = asyncio.run(run_load(target, requests, prepare_all(target, requests, 10, 0), drain_s=0.1))
    assert {one.status for one in record.sent} == {UNFINISHED}
    numbers = run_numbers(record, [0.2])
    assert numbers["failed_requests"] == 4 and numbers["sustained"] == 0 and numbers["goodput_rps"] == 0


def test_a_wait_too_short_for_the_limit_is_noted() -> None:
    requests = make_requests("4/50", 4, arrivals=Arrivals("poisson", 100.0))
    target = StubTarget(Schedule(0.01, 0.05))
    record = asyncio.run(run_load(target, requests, prepare_all(target, requests, 10, 0), drain_s=0.1))
    run, options = Run(0, record.elapsed_s, {}, requests=record.columns()), replace(OPTIONS, drain_s=9.0)
    (note,) = ended_early([run], replace(options, limits_s=(0.1, 0.2)), 50)
    assert note.startswith(
        "answers were ended 9 s after the last arrival, but 50 tokens may take 10 s within the limit"
    )
    assert not list(ended_early([run], options, 45)), "long enough for 45 tokens of 200 ms"
    done = replace(run, requests={"status": (OK,)})
    assert not list(ended_early([done], options, 50)), "nothing was ended"


class Refusing(StubTarget):
    """Refuses every other request, and gives too few tokens in every fourth."""

    def __init__(self) -> None:
        super().__init__(Schedule(0.001, 0.001))
        self.n_sent = 0

    async def send(self, request: int, heard: Heard) -> None:
        self.n_sent += 1
        if self.n_sent % 2:
            raise RequestError("HTTP 429: the queue is full")
        await super().send(request - (self.n_sent % 4 == 0), heard)


def test_failures_are_counted_with_their_reason() -> None:
    requests = make_requests("4/5", 8)
    target = Refusing()
    record = asyncio.run(run_load(target, requests, prepare_all(target, requests, 10, 0)))
    statuses = [one.status for one in record.sent]
    assert statuses.count(OK) == 2
    assert statuses.count("HTTP 429: the queue is full") == 4
    assert statuses.count("1 of 5 tokens are missing") == 2
    numbers = run_numbers(record, [0.2])
    assert (numbers["failed_requests"], numbers["within_limit_percent"], numbers["sustained"]) == (6, 25.0, 0.0)


@pytest.mark.parametrize("capacity", [0.3, 3.7, 41.0])
def test_bisection_finds_the_capacity(capacity: float) -> None:
    known: dict[float, bool] = {2.0: capacity >= 2.0}

    async def probe(rate: float) -> bool:
        return rate <= capacity

    asyncio.run(highest_sustained(probe, known, 0.05))
    best = max(rate for rate, good in known.items() if good)
    assert best <= capacity <= best * 1.051
    assert len(known) < 20


class Known(Sweep):
    """An engine that takes 1 ms a token for each request a second."""

    async def measure(self, rate_rps: float) -> dict[str, float]:
        taken_s = [rate_rps / 1000] * LEAST_REQUESTS
        numbers = {"tokens_per_s": 1.0, "offered_rps": rate_rps, "normalised_latency_mean_s": taken_s[0]}
        numbers |= judged(taken_s, taken_s, LEAST_REQUESTS, rate_rps, OPTIONS_OF_TWO.limits_s)
        self.series.append(Series(f"{rate_rps:g} requests/s", numbers=numbers, rate_rps=rate_rps))
        return numbers


OPTIONS_OF_TWO = replace(OPTIONS, limits_s=(0.2, 0.1), warmup=0, find=True, resolution=0.05)


def test_each_of_several_limits_has_its_highest_rate() -> None:
    sweep = Known(StubTarget(SLOW), OPTIONS_OF_TWO, 10)
    found = asyncio.run(sweep.run())
    assert set(found) == {"highest_sustained_rate_rps", "highest_sustained_rate_rps_100ms"}
    assert 190 < found["highest_sustained_rate_rps"] <= 200 and 95 < found["highest_sustained_rate_rps_100ms"] <= 100
    measured = [series.rate_rps for series in sweep.series]
    assert len(measured) == len(set(measured)) and measured == sorted(measured, key=lambda rate: rate or 0.0)
    shown = {
        series.rate_rps: line for series, line in zip(sweep.series, list(rate_lines(sweep.series))[2:], strict=True)
    }
    assert shown[10.0].split()[-1] == "1"
    assert shown[160.0].endswith("not sustained within 100 ms")
    assert shown[320.0].endswith("not sustained within 200 ms and 100 ms")


def test_a_limit_that_no_rate_keeps_ends_the_search() -> None:
    tried: list[float] = []

    async def probe(rate: float) -> bool:
        tried.append(rate)
        return False

    asyncio.run(highest_sustained(probe, {16.0: False}, 0.1, 2.0))
    assert tried == [8.0, 4.0, 2.0], "else rates are halved until eight requests take hours"


def test_an_engine_of_this_process_completes_a_sweep(config: EngineConfig) -> None:
    options = OnlineOptions(workload="12/6", rates=(20.0, 40.0), seconds=0.5, warmup=2, seed=1)
    result = online_in_process(config, options, command=("nanoflow", "bench"))
    assert parse_result(result.to_json()).kind is BenchKind.ONLINE
    for series in result.series:
        (run,) = series.runs
        assert set(run.requests["status"]) == {OK}
        assert set(run.requests["output_tokens"]) == {6}
        assert run.numbers["ttft_mean_s"] < run.numbers["latency_mean_s"]
    assert result.model.dtype == "float32" and result.machine.device == "cpu"
    assert result.seeds == (1, 2)


def test_an_endpoint_that_is_not_there_is_an_error_with_the_fix() -> None:
    endpoint = Endpoint("http://127.0.0.1:9")

    async def enter() -> None:
        async with endpoint:
            pass

    with pytest.raises(ConfigError, match="check --url"):
        asyncio.run(enter())
    assert endpoint._session is not None and endpoint._session.closed


@pytest.mark.parametrize(
    "change",
    [
        {"rates": ()},
        {"rates": (0.0,)},
        {"seconds": 0.0},
        {"limits_s": (0.2, 0.0)},
        {"limits_s": (0.2, 0.2)},
        {"drain_s": -1.0},
    ],
)
def test_impossible_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(OPTIONS, **change)  # type: ignore[arg-type]
