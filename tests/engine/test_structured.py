"""Structured output in the engine: random weights write what a schema allows, and nobody else notices."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.structured import StructuredOutput
from nanoflow.engine.build import Engine
from nanoflow.engine.outputs import completion_output
from nanoflow.engine.sequence import Sequence
from tests.e2e.tiny_models import make_tiny_engine, prompt_of, save_tiny_model

EOS = 1
Check = Callable[[Any], bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model, with an end token."""
    folder = tmp_path_factory.mktemp("tiny-structured")
    save_tiny_model("qwen2", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": EOS}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = make_tiny_engine(folder, "auto")
    yield engine
    engine.close()


def drive(engine: Engine, all_params: list[SamplingParams], *, together: bool = True) -> list[Sequence]:
    """All requests' sequences, each with a prompt of its own, run together or one after the other."""
    requests = [engine.submission.sequences(prompt_of(5 + i % 7, i), p) for i, p in enumerate(all_params)]
    groups = [[s for request in requests for s in request]] if together else requests
    for group in groups:
        for sequence in group:
            engine.core.add(sequence)
        in_flight = None
        while engine.core.has_work or in_flight is not None:
            in_flight = engine.core.step(in_flight)
    return [s for request in requests for s in request]


def text_of(engine: Engine, sequence: Sequence) -> str:
    return completion_output(sequence, engine.tokenizer).text


def tokens_of(sequences: list[Sequence]) -> list[list[int]]:
    return [sequence.output_ids for sequence in sequences]


def random_schema(rng: random.Random, depth: int = 2) -> tuple[dict[str, Any], Check]:
    """A schema whose texts have an end in sight, and what a value that follows it must be like."""
    kinds = ["string", "integer", "boolean", "enum", "pattern", *(["object", "array"] * 2 if depth else [])]
    match rng.choice(kinds):
        case "string":
            most = rng.randint(0, 6)
            return {"type": "string", "maxLength": most}, lambda v: isinstance(v, str) and len(v) <= most
        case "integer":
            low, high = sorted(rng.sample(range(-5000, 5000), 2))
            return {"type": "integer", "minimum": low, "maximum": high}, lambda v: type(v) is int and low <= v <= high
        case "boolean":
            return {"type": "boolean"}, lambda v: isinstance(v, bool)
        case "enum":
            values = rng.sample(["a", "bc", 'say "x"', 12, 3.5, None, "ä€😀"], 3)
            return {"enum": values}, lambda v: v in values
        case "pattern":
            return {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+z$", "maxLength": 12}, lambda v: bool(
                re.fullmatch("[a-f]{2,4}-[0-9]+z", v)
            )
        case "array":
            inner, check = random_schema(rng, depth - 1)
            most = rng.randint(1, 3)
            return {"type": "array", "items": inner, "maxItems": most}, lambda v: len(v) <= most and all(map(check, v))
        case _:
            inner_of = {f"key {i}": random_schema(rng, depth - 1) for i in range(rng.randint(1, 3))}
            required = [name for name in inner_of if rng.random() < 0.7]
            schema = {
                "type": "object",
                "properties": {name: inner for name, (inner, _) in inner_of.items()},
                "required": required,
                "additionalProperties": False,
            }
            return schema, lambda v: set(required) <= set(v) <= set(inner_of) and all(inner_of[k][1](v[k]) for k in v)


def guided(number: int, **changes: Any) -> tuple[SamplingParams, Check]:
    schema, check = random_schema(random.Random(number))
    options = {"max_tokens": 480, "seed": number, "temperature": 0.0 if number % 4 == 0 else 1.0, **changes}
    return SamplingParams(structured=StructuredOutput(json=schema), **options), check


GUIDED = [guided(number) for number in range(50)]
FREE = [SamplingParams(max_tokens=40, seed=n, temperature=float(n % 2), ignore_eos=True) for n in range(8)]


@pytest.fixture(scope="module")
def mixed(engine: Engine) -> list[Sequence]:
    """The free requests and 50 guided ones in the same batches."""
    return drive(engine, [*FREE, *[params for params, _ in GUIDED]])


def test_random_weights_follow_random_schemas(engine: Engine, mixed: list[Sequence]) -> None:
    for sequence, (params, check) in zip(mixed[len(FREE) :], GUIDED, strict=True):
        text = text_of(engine, sequence)
        wanted = params.structured
        assert sequence.finish_reason == "stop", (wanted, text)
        assert sequence.stop_reason is None
        assert check(json.loads(text)), (wanted, text)
    assert len({text_of(engine, sequence) for sequence in mixed[len(FREE) :]}) > 30, "they choose freely otherwise"


def test_free_requests_do_not_notice(engine: Engine, mixed: list[Sequence]) -> None:
    assert tokens_of(drive(engine, FREE)) == tokens_of(mixed[: len(FREE)])


def test_the_order_of_steps_changes_no_token(engine: Engine, folder: Path, mixed: list[Sequence]) -> None:
    synchronous = make_tiny_engine(folder, "auto", asynchronous=False)
    try:
        again = drive(synchronous, [*FREE, *[params for params, _ in GUIDED]])
    finally:
        synchronous.close()
    assert tokens_of(again) == tokens_of(mixed)


def test_guided_requests_alone_leave_out_no_iteration(engine: Engine) -> None:
    """Two groups that began one after the other sample together from then on."""
    params = SamplingParams(structured=StructuredOutput(regex="[a-z]{30}"), seed=1, max_tokens=40)
    first, second = (engine.submission.sequences(prompt_of(6, i), params)[0] for i in range(2))
    steps, in_flight = 0, None
    engine.core.add(first)
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)
        steps += 1
        if steps == 4:
            engine.core.add(second)
    assert len(first.output_ids) == len(second.output_ids) == 30
    assert steps < 4 + 30 + 4, "a token each in nearly every step"


def test_company_changes_no_token(engine: Engine, mixed: list[Sequence]) -> None:
    some = [*FREE, *[params for params, _ in GUIDED]][:20]
    assert tokens_of(drive(engine, some, together=False)) == tokens_of(mixed[:20])


def test_ranks_give_the_tokens_of_one(folder: Path, engine: Engine, mixed: list[Sequence]) -> None:
    two = make_tiny_engine(folder, "auto", tensor_parallel_size=2)
    try:
        some = [*FREE, *[params for params, _ in GUIDED]][:16]
        texts = [text_of(two, sequence) for sequence in drive(two, some)]
    finally:
        two.close()
    assert texts == [text_of(engine, sequence) for sequence in mixed[:16]]


def test_preempted_requests_go_on_where_they_were(engine: Engine, mixed: list[Sequence]) -> None:
    scheduler, before = engine.core.scheduler, engine.core.scheduler.preemptions
    schedule, rng = scheduler.schedule, random.Random(1)

    def schedule_and_preempt() -> Any:
        holding = scheduler.table.holding()
        if len(holding) and rng.random() < 0.3:
            scheduler._preempt(int(rng.choice(holding)))  # with its token in flight or without
        return schedule()

    scheduler.schedule = schedule_and_preempt  # type: ignore[method-assign]
    try:
        again = drive(engine, [*FREE, *[params for params, _ in GUIDED]])
    finally:
        scheduler.schedule = schedule  # type: ignore[method-assign]
    assert scheduler.preemptions > before + 20
    assert tokens_of(again) == tokens_of(mixed)


def test_regex_choice_and_grammar(engine: Engine) -> None:
    lark = 'start: "[" item ("," item)* "]"\nitem: /[0-9]{1,3}/ | "x"'
    gbnf = 'root ::= "<" ("ab" | root)? ">"'
    wanted = [
        StructuredOutput(regex=r"[A-Z]{3}-\d{2}(é|ü)?"),
        StructuredOutput(choice=["yes", "no", "ja 😀", 'a "quote"']),
        StructuredOutput(grammar=lark),
        StructuredOutput(grammar=gbnf),
        StructuredOutput(json_object=True),
    ]
    params = [SamplingParams(structured=w, seed=s, max_tokens=300) for w in wanted for s in range(6)]
    sequences = drive(engine, params)
    texts = [text_of(engine, sequence) for sequence in sequences]
    assert {s.finish_reason for s in sequences[:12]} == {"stop"}
    assert all(re.fullmatch(r"[A-Z]{3}-\d{2}(é|ü)?", text) for text in texts[:6])
    assert set(texts[6:12]) <= {"yes", "no", "ja 😀", 'a "quote"'} and len(set(texts[6:12])) > 1
    for sequence, text in zip(sequences[12:], texts[12:], strict=True):
        if sequence.finish_reason == "length":
            assert len(sequence.output_ids) == 300
        elif text.startswith("["):
            assert re.fullmatch(r"\[(\d{1,3}|x)(,(\d{1,3}|x))*\]", text)
        elif text.startswith("<"):
            assert re.fullmatch("<*(ab)?>*", text) and text.count("<") == text.count(">")
        else:
            assert isinstance(json.loads(text), dict)
    assert sum(s.finish_reason == "stop" for s in sequences[12:]) > 6


def test_the_cut_by_length_says_so_and_a_whole_answer_does_not(engine: Engine) -> None:
    wanted = StructuredOutput(regex="abcdef")
    cut, whole = drive(engine, [SamplingParams(structured=wanted, max_tokens=n, temperature=0) for n in (3, 6)])
    assert (text_of(engine, cut), cut.finish_reason) == ("abc", "length")
    assert (text_of(engine, whole), whole.finish_reason) == ("abcdef", "stop")


def test_the_end_token_comes_only_where_the_grammar_may_end(engine: Engine) -> None:
    open_end = StructuredOutput(regex="a{4,}")
    eager = {"logit_bias": {EOS: 100.0}, "temperature": 0, "max_tokens": 12}
    params = [
        SamplingParams(structured=open_end, **eager),
        SamplingParams(structured=open_end, **eager, min_tokens=9),
        SamplingParams(structured=open_end, **eager, ignore_eos=True),
        SamplingParams(structured=StructuredOutput(regex="a{4,6}"), **eager, min_tokens=12),
        SamplingParams(structured=StructuredOutput(regex="(b|a{4})?"), **eager, include_stop_str_in_output=True),
    ]
    sequences = drive(engine, params)
    assert [text_of(engine, s) for s in sequences[:4]] == ["aaaa", "a" * 9, "a" * 12, "a" * 6]
    assert [s.finish_reason for s in sequences] == ["stop", "stop", "length", "stop", "stop"]
    assert sequences[0].output_ids[-1] == EOS
    assert sequences[4].output_ids == [EOS], "the empty text is one of its texts"


def test_stop_strings_and_stop_ids_still_end_it(engine: Engine) -> None:
    wanted = StructuredOutput(regex="abcdef")
    by_text, by_id = drive(
        engine,
        [
            SamplingParams(structured=wanted, stop="cd", logit_bias={ord(c): 50.0 for c in "abcdef"}),
            SamplingParams(structured=wanted, stop_token_ids=[ord("d")], logit_bias={ord(c): 50.0 for c in "abcdef"}),
        ],
    )
    assert (text_of(engine, by_text), by_text.stop_reason) == ("ab", "cd")
    assert (text_of(engine, by_id), by_id.stop_reason) == ("abc", ord("d"))


def test_penalties_logprobs_and_choices_work_with_it(engine: Engine) -> None:
    wanted = StructuredOutput(regex="[0-9]{30}")
    base = {"structured": wanted, "max_tokens": 40, "seed": 3}
    sequences = drive(
        engine,
        [
            SamplingParams(**base, temperature=0),
            SamplingParams(**base, temperature=0, frequency_penalty=2.0, presence_penalty=2.0),
            SamplingParams(**base, n=3, logprobs=2),
            SamplingParams(**base, top_k=2, top_p=0.9, min_p=0.05),
        ],
    )
    texts = [text_of(engine, sequence) for sequence in sequences]
    assert all(re.fullmatch("[0-9]{30}", text) for text in texts)
    assert len(set(texts[1])) > len(set(texts[0])), "penalties spread the digits"
    assert len(set(texts[2:5])) == 3, "choices differ by their seeds"
    for sequence in sequences[2:5]:
        assert sequence.logprobs is not None and len(sequence.logprobs) == len(sequence.output_ids)
        assert all(token in table for token, table in zip(sequence.output_ids, sequence.logprobs, strict=True))
        ranks = [table[token].rank or 0 for token, table in zip(sequence.output_ids, sequence.logprobs, strict=True)]
        assert max(ranks) > 10, "log-probabilities are the model's own, before the mask"


def test_a_choice_has_the_tokens_it_would_have_alone(engine: Engine) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4}
    params = SamplingParams(structured=StructuredOutput(json=schema), seed=11, n=1, max_tokens=100)
    alone = drive(engine, [params])[0]
    first = drive(engine, [SamplingParams(structured=params.structured, seed=11, n=4, max_tokens=100)])[0]
    assert first.output_ids == alone.output_ids


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(engine: Engine) -> None:
    params = SamplingParams(structured=StructuredOutput(regex="[a-z]{5}"), max_tokens=10, seed=1)
    broken, sound = engine.submission.sequences([1, 2], params)[0], engine.submission.sequences([1, 2], params)[0]
    assert broken.guide is not None
    broken.guide._matcher.consume_token(ord("!"))  # no such text: the parser is in its error state from here on
    for sequence in (broken, sound):
        engine.core.add(sequence)
    in_flight = None
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)
    assert broken.finish_reason == "error" and "the grammar cannot go on" in (broken.error or "")
    assert re.fullmatch("[a-z]{5}", text_of(engine, sound))
    assert engine.core.stats().kv_pages_used == 0


def test_a_bad_schema_never_reaches_the_queue(engine: Engine) -> None:
    for wanted, sentence in [
        (StructuredOutput(json={"type": "fool"}), "the JSON schema cannot be followed: .*fool.*change it"),
        (StructuredOutput(regex="(a"), "the regular expression cannot be followed: .*unclosed group"),
        (StructuredOutput(grammar="start: nothing"), "the grammar cannot be followed: .*unknown name"),
    ]:
        with pytest.raises(InvalidRequestError, match=sentence):
            engine.submission.sequences([1], SamplingParams(structured=wanted))
    assert engine.core.n_queued == 0
