"""Text of a sequence as its tokens arrive: detokenised piece by piece, and cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.core.sampling import SamplingParams
from nanoflow.text.base import Tokenizer
from nanoflow.text.detokenize import IncrementalDetokenizer
from nanoflow.text.stop import StopChecker


class TextStream:
    """Feeds tokens, yields text that will not be taken back. One a sequence; not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, shown_ids=params.shown_special_ids
        )
        self._stops = StopChecker(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None

    def feed(
        self, token_ids: Sequence[int], *, last: bool, drop_last_token: bool = False, may_stop: bool = True
    ) -> tuple[str, str | None]:
        """Text that `token_ids` make safe to show, and the stop string found in it, if any.

        `last` flushes what was held back. `drop_last_token` keeps the final token (a stop id) out of the text.
        Without `may_stop` (tokens below the minimum length, fed before all others) no stop string is looked for.
        """
        shown = token_ids[:-1] if drop_last_token else token_ids
        text = self._detokenizer.push(shown)
        if last:
            text += self._detokenizer.finish()
        if self._stops is None or not may_stop:
            return text, None
        safe, matched = self._stops.feed(text)
        if last and matched is None:
            safe += self._stops.finish()
        return safe, matched
