"""`StructuredOutput`: one field, of the right kind, and equal where the same is asked."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.structured import StructuredOutput


def test_a_schema_is_the_same_as_mapping_and_as_text() -> None:
    as_mapping = StructuredOutput(json={"type": "string", "title": "é"})
    assert as_mapping == StructuredOutput(json='{"type":"string",  "title":"\\u00e9"}')
    assert len({as_mapping, StructuredOutput(json={"title": "é", "type": "string"})}) == 2, "the order of names counts"
    assert as_mapping.kind == "json"
    assert StructuredOutput(json={}).kind == "json"
    assert StructuredOutput(choice=["a", "b"]) == StructuredOutput(choice=("a", "b"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "not none of them"),
        ({"json": {}, "regex": "a"}, "not json and regex"),
        ({"json_object": True, "grammar": "start: /a/"}, "not json_object and grammar"),
        ({"json_object": "yes"}, "json_object must be true or false"),
        ({"json": "nonsense"}, "json is not a JSON schema"),
        ({"json": [1]}, "json must be a JSON schema"),
        ({"json": {"a": {1, 2}}}, "json is not a JSON schema"),
        ({"json": {"a": float("nan")}}, "json is not a JSON schema"),
        ({"json": '{"a":' * 200_000}, "json is not a JSON schema"),
        ({"regex": 5}, "regex must be a non-empty text"),
        ({"grammar": ""}, "grammar must be a non-empty text"),
        ({"choice": "ab"}, "choice must be a list of texts"),
        ({"choice": []}, "choice must be a list of texts"),
        ({"choice": ["a", ""]}, "choice must hold non-empty texts"),
        ({"choice": ["a"] * 10_001}, "give at most 10000"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        StructuredOutput(**fields)


def test_sampling_parameters_take_it_as_a_mapping_too() -> None:
    assert SamplingParams(structured=StructuredOutput(regex="a")).structured is not None
    from_mapping = SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]
    assert from_mapping.structured == StructuredOutput(regex="a")
    for wrong in ("a+", {"regexp": "a"}, 5):
        with pytest.raises(InvalidRequestError, match="structured must have one of the fields json, json_object"):
            SamplingParams(structured=wrong)  # type: ignore[arg-type]
