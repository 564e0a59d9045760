"""The automaton agrees with `re` on where the first match to end begins, however the text is cut."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam.core.errors import BadRequest
from hornbeam.text.regex import Scanner, compile_regex

pytestmark = pytest.mark.pure

PATTERNS = [
    "abc",
    "a+b",
    "a.c",
    "(?:ab|ba)+c",
    "a{2,3}b",
    "(a|b)*c",
    "[^ab]b",
    "[a-b]{3}",
    r"\d+\.",
    r"\s\w",
    "(?i)aB",
    "(?s)a.b",
    "^ab",
    "^a|bb",
    "a??b",
    r"\n\n",
    "(?i:A)b",
]


def expected(pattern: str, text: str) -> tuple[int, int] | None:
    """By trying every end, then every start."""
    compiled = re.compile(pattern)
    for end in range(1, len(text) + 1):
        for start in range(end):
            if compiled.fullmatch(text, start, end):
                return start, end
    return None


@settings(deadline=None, derandomize=True, max_examples=150)
@given(pattern=st.sampled_from(PATTERNS), pieces=st.lists(st.text("abcAB1. \n", max_size=4), max_size=6))
def test_agrees_with_re(pattern: str, pieces: list[str]) -> None:
    scanner, text = Scanner(compile_regex(pattern)), ""
    for piece in pieces:
        text += piece
        found = scanner.feed(piece)
        assert found == expected(pattern, text)
        if found is not None:
            return
        assert 0 <= scanner.pending <= len(text)
    # Whatever comes, no match begins before what is pending.
    for more in ("a", "b", "c", "1.", "\nb", "aab"):
        span = expected(pattern, text + more)
        assert span is None or span[0] >= scanner.pending


def test_a_text_that_can_become_no_match_is_not_pending() -> None:
    scanner = Scanner(compile_regex("END+!"))
    assert scanner.feed("some EN") is None
    assert scanner.pending == 5
    assert scanner.feed("tity") is None
    assert scanner.pending == 11


def test_time_is_linear() -> None:
    assert Scanner(compile_regex("(a+)+b")).feed("a" * 5000) is None


@pytest.mark.parametrize(
    "pattern", ["(", "a*", "", r"(a)\1", "a$", r"a\b", "(?=a)b", "(?<=a)b", "(?m)^a", "(a{1000}){1000}", "x" * 3000]
)
def test_what_cannot_be_matched_is_refused(pattern: str) -> None:
    with pytest.raises(BadRequest, match="stop_regex") as caught:
        compile_regex(pattern)
    assert caught.value.field == "stop_regex"
