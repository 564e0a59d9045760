"""Regular expressions that are matched while text arrives, character by character.

In contrast to `re` this tells how much of the text may still become a match, and takes time linear in the text
whatever the pattern (Thompson, 1968), so no client can keep the server busy with one. In return a pattern describes
its match alone: no references to groups, and nothing about what stands around it but the text's beginning.
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import BadRequest

MAX_STATES = 2000
_ACCEPT = 0
_parser: Any = importlib.import_module("re._parser")  # the standard library's own syntax trees

Test = Callable[[str], bool]

_CATEGORIES: dict[str, Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda char: not char.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda char: not char.isspace(),
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
    "CATEGORY_NOT_WORD": lambda char: not (char.isalnum() or char == "_"),
}


@dataclass(frozen=True, slots=True)
class Automaton:
    """States that each take one character. `steps[state]`: its test, and the states that follow if it is passed."""

    pattern: str
    steps: tuple[tuple[Test, tuple[int, ...]], ...]
    at_start: tuple[int, ...]  # states in which a match may begin at the start of the text
    anywhere: tuple[int, ...]  # and elsewhere


class Scanner:
    """Looks for the match of one automaton that ends first; of several, the one that begins first."""

    def __init__(self, automaton: Automaton) -> None:
        self.pattern = automaton.pattern
        self._automaton = automaton
        self._threads: dict[int, int] = {}  # state -> where its match begins, the earliest
        self._length = 0

    @property
    def pending(self) -> int:
        """Where the earliest match begins that the text so far may be the start of; the text's length if none."""
        return min(self._threads.values(), default=self._length)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Go on with `text`. Where the match begins and ends, counted from the start of all text, if there is one."""
        steps = self._automaton.steps
        for char in text:
            for state in self._automaton.anywhere if self._length else self._automaton.at_start:
                self._threads.setdefault(state, self._length)
            self._length += 1
            threads: dict[int, int] = {}
            for state, begin in self._threads.items():
                test, targets = steps[state]
                if test(char):
                    for target in targets:
                        threads[target] = min(begin, threads.get(target, begin))
            self._threads = threads
            if _ACCEPT in threads:
                return threads[_ACCEPT], self._length
        return None


@functools.lru_cache(maxsize=256)
def compile_regex(pattern: str) -> Automaton:
    """The automaton of a pattern in the syntax of `re`.

    Raises:
        BadRequest: it is wrong, uses what is not supported, is too large, or matches the empty text.
    """
    try:
        tree = _parser.parse(pattern)
        builder = _Builder()
        start = builder.sequence(tree, tree.state.flags, _ACCEPT)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRequest(f"stop_regex {pattern!r} is no regular expression: {error}", "stop_regex") from error
    except _Unsupported as error:
        raise BadRequest(f"stop_regex {pattern!r}: {error}", "stop_regex") from error
    at_start = builder.reachable((start,), at_start=True)
    if _ACCEPT in at_start:
        raise BadRequest(f"stop_regex {pattern!r} matches the empty text, so it would match at once", "stop_regex")
    steps = tuple((test, builder.reachable(targets)) for test, targets in builder.states)
    return Automaton(pattern, steps, at_start, builder.reachable((start,)))


class _Unsupported(Exception):
    """A part of a pattern that no automaton can express, or too much of it."""


def _never(char: str) -> bool:
    return False


def _skip(char: str) -> bool:
    """Marks states that take no character."""
    raise AssertionError("never asked")


def _first(char: str) -> bool:
    """Marks states that take no character, and are passed at the start of the text alone."""
    raise AssertionError("never asked")


class _Builder:
    """Makes states from a syntax tree, each part knowing which state comes after it."""

    def __init__(self) -> None:
        self.states: list[tuple[Test, tuple[int, ...]]] = [(_never, ())]

    def sequence(self, items: Any, flags: int, target: int) -> int:
        """The state in which a sequence of parts begins that leads to `target`."""
        for operation, argument in reversed(list(items)):
            target = self._part(str(operation), argument, flags, target)
        return target

    def reachable(self, states: tuple[int, ...], *, at_start: bool = False) -> tuple[int, ...]:
        """The states that take a character, and the accepting one, that can be entered from `states` without any."""
        seen, todo = dict.fromkeys(states), list(states)
        while todo:
            test, targets = self.states[todo.pop()]
            if test is _skip or (test is _first and at_start):
                new = [target for target in targets if target not in seen]
                seen.update(dict.fromkeys(new))
                todo += new
        return tuple(state for state in seen if self.states[state][0] not in (_skip, _first))

    def _part(self, operation: str, argument: Any, flags: int, target: int) -> int:
        match operation:
            case "BRANCH":
                return self._add(_skip, *(self.sequence(items, flags, target) for items in argument[1]))
            case "SUBPATTERN":
                _, added, removed, items = argument
                return self.sequence(items, (flags | added) & ~removed, target)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, items = argument
                return self._repeat(least, most, items, flags, target)
            case "AT" if str(argument) in ("AT_BEGINNING", "AT_BEGINNING_STRING") and not flags & re.MULTILINE:
                return self._add(_first, target)
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return self._add(_test_of(operation, argument, flags), target)
        raise _Unsupported(f"{operation.lower()} is not supported: leave out anchors but ^, lookarounds and references")

    def _repeat(self, least: int, most: Any, items: Any, flags: int, target: int) -> int:
        if most is _parser.MAXREPEAT:
            loop = self._add(_skip)
            self.states[loop] = (_skip, (self.sequence(items, flags, loop), target))
            target = loop
        else:
            for _ in range(most - least):
                target = self._add(_skip, self.sequence(items, flags, target), target)
        for _ in range(least):
            target = self.sequence(items, flags, target)
        return target

    def _add(self, test: Test, *targets: int) -> int:
        if len(self.states) == MAX_STATES:
            raise _Unsupported(f"it needs more than {MAX_STATES} states; make it shorter")
        self.states.append((test, targets))
        return len(self.states) - 1


def _test_of(operation: str, argument: Any, flags: int) -> Test:
    """Whether a part of one character matches it."""
    if operation == "ANY":
        return (lambda char: True) if flags & re.DOTALL else "\n".__ne__
    items = argument if operation == "IN" else [(operation.removeprefix("NOT_"), argument)]
    negated = operation == "NOT_LITERAL" or (operation == "IN" and str(items[0][0]) == "NEGATE")
    tests = [_item_test(str(kind), value) for kind, value in items if str(kind) != "NEGATE"]

    def test(char: str) -> bool:
        forms = (char, char.lower(), char.upper()) if flags & re.IGNORECASE else (char,)
        return any(item(form) for item in tests for form in forms) is not negated

    return test


def _item_test(kind: str, value: Any) -> Test:
    if kind == "CATEGORY":
        return _CATEGORIES[str(value)]
    if kind == "RANGE":
        first, last = map(chr, value)
        return lambda char: first <= char <= last
    return chr(value).__eq__
