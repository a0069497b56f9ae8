"""Stop strings: found wherever the text is cut into pieces, and never shown in part."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.text.stop import StopChecker

TEXT = st.text(alphabet="ab#", max_size=30)
STOPS = st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Try every prefix, shortest first: brute force."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            stop = max(matched, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    checker = StopChecker(stops, include_stop=include)
    shown: list[str] = []
    for piece in pieces:
        safe, matched = checker.feed(piece)
        shown.append(safe)
        if matched is not None:
            return shown, matched
    return [*shown, checker.finish()], None


@settings(max_examples=500)
@given(text=TEXT, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 30), max_size=8))
def test_same_as_brute_force_however_the_text_is_cut(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    shown, matched = streamed(pieces, stops, include)
    assert ("".join(shown), matched) == reference(text, stops, include)


@settings(max_examples=300)
@given(text=TEXT, stops=STOPS)
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for character in text:
        safe, matched = checker.feed(character)
        shown += safe
        if matched is not None:
            return
        seen = text[: len(shown)] + checker.finish()
        checker = StopChecker(stops)
        checker.feed(seen[len(shown) :])
        held = seen[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_partial_stop_is_released_when_it_fails() -> None:
    checker = StopChecker(["###"])
    assert checker.feed("a##") == ("a", None)
    assert checker.feed("b") == ("##b", None)
    assert checker.feed("#") == ("", None)
    assert checker.finish() == "#"
    assert checker.finish() == ""


def test_include_shows_the_stop() -> None:
    assert StopChecker(["END"], include_stop=True).feed("a END b") == ("a END", "END")
    assert StopChecker(["END"]).feed("a END b") == ("a ", "END")


def test_without_stops_everything_is_safe() -> None:
    checker = StopChecker([])
    assert checker.feed("abc") == ("abc", None)
    assert checker.finish() == ""
