"""Chat templates in the manner of model families that know tools, and a tokenizer of bytes that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.text.byte_tokenizer import ByteTokenizer

QWEN = """
{%- if tools %}<system># Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": ...}</tool_call>.</system>
{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}</{{ message.role }}>
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

LLAMA = """
{%- for message in messages %}[{{ message.role }}]
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}
{%- else %}
{%- if tools and loop.last %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{{- message.content }}
{%- endif %}
{%- endfor %}"""

MISTRAL = """
{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ message.content }}[/INST]
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.name }}: {{ message.content }}[/TOOL_RESULTS]
{%- elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 characters") }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- endfor %}]
{%- else %}{{ message.content }}
{%- endif %}
{%- endfor %}"""

SILENT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


class TemplatedTokenizer(ByteTokenizer):
    """Bytes, with a chat template, and tokens of their own for `tokens`, which are `special` or not."""

    def __init__(self, template: str, tokens: Sequence[str] = (), *, special: bool = True) -> None:
        super().__init__(256 + len(tokens))
        self._default = template
        self._tokens = {text: 256 + place for place, text in enumerate(tokens)}
        self.special_ids = frozenset(self._tokens.values() if special else ())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self._tokens[text]] if text in self._tokens else super().encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        named = {number: text for text, number in self._tokens.items()}
        return named[token_id].encode() if token_id in named else super().token_bytes(token_id)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        hidden = self.special_ids if skip_special_tokens else frozenset()
        return super().decode([token for token in token_ids if token not in hidden])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> str:
        return super().render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template or self._default,
            **template_args,
        )
