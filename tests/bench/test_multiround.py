"""Conversations: the history of a round is exactly the rounds before it, and reuse saves what the trace predicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.bench.conversations import choose_conversations, usable_part
from nanoflow.bench.engines import built
from nanoflow.bench.multiround import NO_REUSE, REUSE, MultiroundOptions, run_multiround
from nanoflow.bench.result import parse_result
from nanoflow.bench.rounds import Conversing
from nanoflow.bench.show import lines_of
from nanoflow.bench.traces import Conversation, Turn
from nanoflow.cli.main import main
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError

TALKS = [
    Conversation("a", (Turn(0, 30, 10), Turn(40, 5, 12), Turn(57, 9, 8))),
    Conversation("b", (Turn(0, 20, 6),)),
    Conversation("c", (Turn(0, 17, 15), Turn(32, 16, 16))),
    Conversation("d", (Turn(0, 8, 9), Turn(17, 40, 5))),
]


def test_the_history_of_a_round_is_the_rounds_before_it(config: EngineConfig) -> None:
    talks = choose_conversations("t", TALKS, 4, seed=1, max_total_tokens=90)
    with built(config) as engine:
        found = Conversing(engine, talks, seed=3, concurrent=2, think_s=0.01).run()
    columns, sequences = found.columns(), found.record.sequences
    assert set(columns["status"]) == {"ok"} and len(sequences) == len(talks.turns) == 8
    tokens: dict[int, list[int]] = {}
    ended: dict[int, float] = {}
    for index, sequence in enumerate(sequences):
        number = found.conversation[index]
        turn = talks.conversations[number].turns[found.turn[index]]
        prompt = sequence.prompt_array.tolist()
        before = tokens.get(number, [])
        assert len(before) == turn.history_tokens
        assert prompt[: len(before)] == before
        assert len(prompt) == turn.prompt_tokens and len(sequence.output_ids) == turn.output_tokens
        assert float(columns["arrival_s"][index] or 0) >= ended.get(number, 0.0)
        tokens[number] = prompt + sequence.output_ids
        ended[number] = float(columns["finished_s"][index] or 0)
    starts = sorted(
        float(value or 0) for value, turn in zip(columns["arrival_s"], found.turn, strict=True) if turn == 0
    )
    ends = sorted(ended.values())
    assert all(start >= ends[number] for number, start in enumerate(starts[2:])), "two at a time"


@pytest.mark.parametrize("dram_bytes", [None, 1 << 21])
def test_reuse_saves_what_the_trace_predicts(config: EngineConfig, dram_bytes: int | None) -> None:
    config = config.with_options("cache", kv_dram_bytes=dram_bytes)
    options = MultiroundOptions(conversations=4, concurrent=4, max_total_tokens=90, seed=2, runs=2)
    result = run_multiround(config, "talks", TALKS, options)
    assert parse_result(result.to_json()) == parse_result(parse_result(result.to_json()).to_json())
    reuse, no_reuse = result.series
    assert (reuse.name, no_reuse.name) == (REUSE, NO_REUSE)
    n_prompt = sum(turn.prompt_tokens for talk in TALKS for turn in talk.turns)
    history = sum(turn.history_tokens for talk in TALKS for turn in talk.turns)
    assert result.numbers["predicted_saved_prefill_percent"] == pytest.approx(100 * history / n_prompt)
    for run in no_reuse.runs:
        assert run.numbers["prefill_tokens_computed"] == n_prompt and run.numbers["hit_tokens"] == 0
    for run in reuse.runs:
        hits = run.numbers["hit_tokens"]
        assert run.numbers["prefill_tokens_computed"] == n_prompt - hits
        assert hits == sum(value for name, value in run.numbers.items() if name.startswith("hit_tokens_"))
        # Whole pages of 16 tokens are found again, and the last token of an answer never entered the cache.
        assert history - 16 * 4 <= hits <= history
    for run in (*reuse.runs, *no_reuse.runs):  # throughput, bound and energy count the same tokens
        (bound,) = run.bounds
        assert bound.tokens_per_s * bound.percent_of_bound / 100 == pytest.approx(run.numbers["tokens_per_s"])
    assert result.numbers["saved_prefill_percent"] > 0.5 * result.numbers["predicted_saved_prefill_percent"]
    assert result.workload.n_conversations == 4
    text = "\n".join(lines_of(result))
    assert f"of {n_prompt:,} prompt tokens {n_prompt:,} were computed, 0 found in the cache" in text
    assert "times the time is taken without reuse" in text


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ((Turn(0, 5, 5), Turn(10, 5, 5)), 2),
        ((Turn(0, 5, 5), Turn(10, 50, 50)), 1),
        ((Turn(0, 5, 0), Turn(5, 5, 5)), 0),
        ((Turn(0, 5, 5), Turn(10, 0, 5)), 1),
        ((Turn(0, 5, 5), Turn(11, 5, 5)), 1),
    ],
)
def test_a_conversation_ends_before_what_cannot_be_run(turns: tuple[Turn, ...], kept: int) -> None:
    assert usable_part(Conversation("x", turns), 100).turns == turns[:kept]


def test_too_few_conversations_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 4 conversations within 90 tokens, 5 are wanted"):
        choose_conversations("t", TALKS, 5, seed=0, max_total_tokens=90)


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "talks.csv"
    trace.write_text("conv_id,turn,history_len,new_input_len,output_len\na,0,0,20,9\na,1,29,4,3\n")
    engine = "--load-format random --dtype float32 --dense-batch 32 --threads 1 --kv-memory-bytes 4194304"
    words = f"bench multiround {tiny_folder} {engine} --conversations 1"
    for name in ("--workload", "--trace"):
        assert main([*words.split(), name, str(trace)]) == 0
        assert "saved_prefill_percent" in capsys.readouterr().out
    assert main(words.split()) == 2
    assert "give --workload FILE.csv" in capsys.readouterr().err
