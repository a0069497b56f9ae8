"""Chat templates: what they may do, what messages may be, and how both fail."""

from typing import Any

import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.text.chat import ChatTemplate, normalise_messages, render

USER = [{"role": "user", "content": "hi"}]


def rendered(source: str, messages: Any = USER, **arguments: Any) -> str:
    return render(ChatTemplate(source), messages, arguments)


def test_whitespace_control_is_that_of_transformers() -> None:
    source = "{% for m in messages %}\n    {{ m.role }}\n  {% endfor %}\nend"
    assert rendered(source) == "    user\nend"


def test_helpers_exist() -> None:
    assert rendered("{{ {'ü': [1]} | tojson }}") == '{"ü": [1]}'
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert rendered("{{ tools }}-{{ bos_token }}", tools="T", bos_token="<s>") == "T-<s>"


def test_oracle_is_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{%- if tools %}\n{{- tools | tojson }}\n{%- endif %}\n{%- for m in messages %}\n"
        "    {{- '<' + m['role'] + '>' + m.content | trim }}\n{%- endfor %}\n"
    )
    messages = [{"role": "user", "content": " a <b> 'c' "}, {"role": "assistant", "content": "é"}]
    expected, _ = render_jinja_template([messages], chat_template=source, tools=[{"name": "f", "type": "function"}])
    assert rendered(source, messages, tools=[{"name": "f", "type": "function"}]) == expected[0]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused these messages: roles must alternate"),
        ("{{ messages[5].content }}", "refused"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|refused"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot render|too big"),
    ],
)
def test_failures_are_the_requests(source: str, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        rendered(source)
    assert caught.value.param == "messages"


def test_broken_template_names_its_parameter() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Jinja") as caught:
        rendered("{% for %}")
    assert caught.value.param == "chat_template"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalise_messages([{"role": "user", "content": parts, "name": "x"}]) == [
        {"role": "user", "content": "ab", "name": "x"}
    ]


def test_assistant_may_have_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [1]}
    assert normalise_messages([message]) == [{**message, "content": ""}]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one message"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\] needs a role"),
        ([{"role": 3, "content": "x"}], "needs a role"),
        ([{"role": "user"}], r"messages\[0\] needs content"),
        ([*USER, {"role": "user", "content": 5}], r"messages\[1\]\.content must be a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "'image_url'; this model reads text only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "reads text only"),
        ([{"role": "user", "content": ["x"]}], "of type 'str'"),
    ],
)
def test_bad_messages_are_refused(messages: Any, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        normalise_messages(messages)
    assert caught.value.param == "messages"


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    normalise_messages(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
