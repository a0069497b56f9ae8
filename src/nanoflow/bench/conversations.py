"""Conversations for the multi-round benchmark: which of a trace, how far, and what reuse their own history predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.bench.result import WorkloadInfo
from nanoflow.bench.traces import Conversation, Turn
from nanoflow.core.errors import ConfigError


@dataclass(frozen=True)
class ConversationSet:
    """Conversations to run. A turn's history is all that was asked and answered before it."""

    name: str
    conversations: tuple[Conversation, ...]
    seed: int
    max_total_tokens: int

    @property
    def turns(self) -> list[Turn]:
        """All turns of all conversations."""
        return [turn for conversation in self.conversations for turn in conversation.turns]

    @property
    def history_tokens(self) -> int:
        """Prompt tokens that were seen or made in an earlier round: what could be reused."""
        return sum(turn.history_tokens for turn in self.turns)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all rounds."""
        return sum(turn.prompt_tokens for turn in self.turns)

    def info(self) -> WorkloadInfo:
        """The workload as a result describes it."""
        prompts = np.array([turn.prompt_tokens for turn in self.turns])
        outputs = np.array([turn.output_tokens for turn in self.turns])
        return WorkloadInfo(
            name=self.name,
            n_requests=len(prompts),
            seed=self.seed,
            prompt_mean_tokens=float(prompts.mean()),
            prompt_deviation_tokens=float(prompts.std()),
            output_mean_tokens=float(outputs.mean()),
            output_deviation_tokens=float(outputs.std()),
            arrivals="after the round before",
            max_total_tokens=self.max_total_tokens,
            n_conversations=len(self.conversations),
        )


def choose_conversations(
    name: str, found: Sequence[Conversation], n: int, *, seed: int, max_total_tokens: int, max_turns: int | None = None
) -> ConversationSet:
    """`n` of the conversations, drawn at random by `seed`; each ends before the first turn that cannot be run.

    That is a turn longer than `max_total_tokens`, one that asks or answers nothing, or one whose history is not what
    came before. Raises `ConfigError` if fewer than `n` have a turn left.
    """
    usable = [usable_part(conversation, max_total_tokens, max_turns) for conversation in found]
    usable = [conversation for conversation in usable if conversation.turns]
    if len(usable) < n or n < 1:
        raise ConfigError(
            f"{name} has {len(usable)} conversations within {max_total_tokens} tokens, {n} are wanted; ask for fewer "
            "(--conversations), at least 1."
        )
    chosen = np.random.default_rng([seed, 0xC0]).permutation(len(usable))[:n]
    return ConversationSet(name, tuple(usable[index] for index in chosen), seed, max_total_tokens)


def usable_part(conversation: Conversation, max_total_tokens: int, max_turns: int | None = None) -> Conversation:
    """The turns before the first one that cannot be run."""
    kept: list[Turn] = []
    history = 0
    for turn in conversation.turns[:max_turns]:
        runnable = turn.new_tokens > 0 and turn.output_tokens > 0 and turn.total_tokens <= max_total_tokens
        if not runnable or turn.history_tokens != history:
            break
        kept.append(turn)
        history = turn.total_tokens
    return Conversation(conversation.conv_id, tuple(kept))
