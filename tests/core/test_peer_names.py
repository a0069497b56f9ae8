"""Another engine's name must lead to an option that exists, and never hide one of ours."""

from __future__ import annotations

from nanoflow.cli.main import build_parser
from nanoflow.core import peer_names


def serve_flags() -> set[str]:
    """Every flag of `nanoflow serve`, as option names."""
    commands = build_parser()._subparsers
    assert commands is not None
    serve = commands._group_actions[0].choices["serve"]  # type: ignore[index,call-overload]
    return {flag.removeprefix("--").replace("-", "_") for action in serve._actions for flag in action.option_strings}


def test_every_name_leads_to_an_option() -> None:
    assert set(peer_names.SAME.values()) <= serve_flags()
    assert not (peer_names.SAME.keys() | peer_names.NEEDLESS.keys()) & serve_flags()


def test_spellings_of_a_name() -> None:
    assert {peer_names.normal(word) for word in ("--block-size=4", "block_size", "--no-block-size")} == {"block_size"}
