"""Stops end the text at the same place however it is cut, and nothing shown is taken back."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.tokenizer.errors import RequestError
from tca_runtime.tokenizer.stops import StopChecker, compile_patterns

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)
PATTERNS = st.lists(
    st.sampled_from(["a+b", "b.a", "(?<=a)b{2}", "a(?=b)", "b$", "aba|bb", "[ab]{5}", "^ab"]),
    max_size=2,
    unique=True,
).map(tuple)
CHUNKS = st.lists(st.text("ab\n", max_size=5), max_size=12)


def run(
    stops: tuple[str, ...], patterns: tuple[str, ...], chunks: list[str], keep: bool = False
) -> tuple[str, str | None, list[str]]:
    checker = StopChecker(stops, compile_patterns(patterns), keep)
    shown: list[str] = []
    for chunk in chunks:
        shown.append(checker.feed(chunk))
        if checker.matched is not None:
            return "".join(shown), checker.matched, shown
    shown.append(checker.flush())
    return "".join(shown), None, shown


def expected(
    stops: tuple[str, ...], patterns: tuple[str, ...], text: str
) -> tuple[int, int] | None:
    """Start and end of the first stop: the shortest prefix that has one, tried one by one."""
    for end in range(1, len(text) + 1):
        prefix = text[:end]
        starts = [end - len(s) for s in stops if prefix.endswith(s)]
        starts += [m.start() for p in patterns if (m := regex.search(p, prefix)) is not None]
        if starts:
            return min(starts), end
    return None


@given(STOPS, PATTERNS, CHUNKS, st.booleans())
def test_result_is_that_of_the_shortest_prefix_with_a_stop(
    stops: tuple[str, ...], patterns: tuple[str, ...], chunks: list[str], keep: bool
) -> None:
    text = "".join(chunks)
    found = expected(stops, patterns, text)
    got, matched, _ = run(stops, patterns, chunks, keep)
    if found is None:
        assert (got, matched) == (text, None)
    else:
        assert got == text[: found[1] if keep else found[0]]
        assert matched in (*stops, *patterns)


@given(STOPS, PATTERNS, st.text("ab\n", max_size=30), st.data())
def test_chunking_does_not_matter(
    stops: tuple[str, ...], patterns: tuple[str, ...], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(stops, patterns, chunks)[:2] == run(stops, patterns, list(text))[:2]


@given(STOPS, PATTERNS, CHUNKS)
def test_without_a_stop_only_what_may_become_one_is_late(
    stops: tuple[str, ...], patterns: tuple[str, ...], chunks: list[str]
) -> None:
    checker = StopChecker(stops, compile_patterns(patterns), False)
    shown = ""
    for chunk in chunks:
        shown += checker.feed(chunk)
        if checker.matched is not None:
            return
    if not patterns:
        late = "".join(chunks)[len(shown) :]
        assert late == "" or any(s.startswith(late) for s in stops)


def test_partial_stop_is_held_back_and_released() -> None:
    assert run(("END",), (), ["abcE", "N", "x"])[2] == ["abc", "", "ENx", ""]
    assert run(("END",), (), ["abcE", "N", "D more"]) == ("abc", "END", ["abc", "", ""])


def test_partial_pattern_is_held_back() -> None:
    assert run((), (r"\n\n+Human",), ["hi\n", "\n", "\nHum", "id", "!"])[2][:4] == [
        "hi",
        "",
        "",
        "\n\n\nHumid",
    ]


def test_longer_of_two_stops_that_end_together_wins() -> None:
    assert run(("b", "ab"), (), ["xab"])[:2] == ("x", "ab")


def test_unarmed_text_is_never_part_of_a_stop() -> None:
    checker = StopChecker(("ab",), compile_patterns(("x+y",)), False)
    assert checker.feed("xa", armed=False) == "xa"
    assert checker.feed("b y a") == "b y "
    assert checker.matched is None
    assert checker.feed("b") == ""
    assert checker.matched == "ab"


@pytest.mark.parametrize("pattern", ["(", "a*", "x" * 300, "", "[z-a]"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError):
        compile_patterns((pattern,))


@pytest.mark.parametrize("pattern", ["(a|aa)+[bc]$", "((a{1,100}){1,100}){1,100}b"])
def test_catastrophic_pattern_ends_with_an_error(pattern: str) -> None:
    checker = StopChecker((), compile_patterns((pattern,)), False)
    with pytest.raises(RequestError, match="too long"):
        checker.feed("a" * 2000 + "!")
