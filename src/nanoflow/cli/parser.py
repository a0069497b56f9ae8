"""The argument parser of every command: an error is one sentence, not a page of usage with the sentence at its end."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from nanoflow.core import peer_names

EXIT_USAGE = 2


def add_log_level(parser: argparse.ArgumentParser, *, below: bool = False) -> None:
    """`--log-level`, before an action's name and after it; `below`: keep what was said before the name."""
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=argparse.SUPPRESS if below else None,
        help="what to log to stderr",
    )


class SentenceParser(argparse.ArgumentParser):
    """Says what is wrong and where help is; unknown options are reported by the command that was given them."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with 2."""
        joint = " See" if message.endswith("?") else "; see"
        print(f"{self.prog}: {message}{joint} {self.prog} --help.", file=sys.stderr)
        sys.exit(EXIT_USAGE)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is unknown here rather than in the parser above, which does not know this command's options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"there is no {unknown[0]}{self._hint(unknown[0])}")
        return found, unknown

    def _hint(self, word: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        peers = peer_names.normal(word) if word.startswith("--") else ""
        same = "--" + peer_names.SAME.get(peers, "").replace("_", "-")
        if same in known:
            return f"; here it is {same}"
        if peers in peer_names.NEEDLESS:
            return f"; {peer_names.NEEDLESS[peers]}"
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1) if word.startswith("-") else []
        return f"; did you mean {near[0]}?" if near else " here"
