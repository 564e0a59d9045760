"""The owner of a request's text: turns generated ids into text as they arrive, and finds stop strings in it.

The text is the concatenation of the tokens' bytes, read as UTF-8. So each token costs the same wherever it stands,
and the text does not depend on how the ids were cut into pieces. It continues the prompt: a leading space stays.
Knows nothing of chats, HTTP or the engine; whoever feeds it tells the engine when a stop string ended the request.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from hornbeam.core.errors import BadRequest
from hornbeam.text.regex import Scanner, compile_regex
from hornbeam.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How generated ids become text.

    Raises:
        BadRequest: a stop string is empty, or a regular expression cannot be matched.
    """

    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()  # see compile_regex
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # of the API; see Tokenizer.decode
    no_stop_trim: bool = False  # the text keeps the stop string, or the stop token, that ended it

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise BadRequest("stop must not hold an empty string: it would match at once", "stop")
        for pattern in self.stop_regex:
            compile_regex(pattern)

    @property
    def stops(self) -> bool:
        """Whether the text may end the request."""
        return bool(self.stop or self.stop_regex)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """A stop string that ended the text."""

    matched: str  # the string, or the regular expression
    keep_tokens: int  # generated tokens up to and including the one that completed the match


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The text that one feed added. A Struct, since one is made per token."""

    text: str = ""
    stopped: StopMatch | None = None


class TextSession:
    """The text of one generation."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped_ids = tokenizer.special_ids if options.skip_special_tokens else frozenset()
        self._options = options
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of an open character
        self._scanners = [Scanner(compile_regex(pattern)) for pattern in options.stop_regex]
        self._held = ""  # not given out yet: the start of a stop string, maybe
        self._num_given = 0  # characters
        self._num_tokens = 0
        self._stopped = False

    def feed(self, token_ids: Sequence[int], finished: bool, *, ends_with_stop_token: bool = False) -> TextDelta:
        """Add generated tokens and take the new text.

        The stop string that is complete first ends the text; of several that complete together, the longest.
        What is fed after that adds nothing.

        Args:
            token_ids: the tokens generated since the last feed.
            finished: no more will come: give out what is held back. An incomplete character becomes U+FFFD.
            ends_with_stop_token: the last of `token_ids` is a token that ended the request (EOS, `stop_token_ids`);
                it is no part of the text, unless `no_stop_trim` is set.
        """
        if self._stopped:
            return TextDelta()
        if ends_with_stop_token and not self._options.no_stop_trim:
            token_ids = token_ids[:-1]
        if not self._options.stops:
            return TextDelta(text=self._utf8.decode(self._bytes_of(token_ids), finished))
        return self._feed_until_stop(token_ids, finished)

    def _feed_until_stop(self, token_ids: Sequence[int], finished: bool) -> TextDelta:
        parts = []
        for token_id in token_ids:
            self._num_tokens += 1
            part, matched = self._match(self._utf8.decode(self._bytes_of((token_id,))))
            parts.append(part)
            if matched is not None:
                return self._stop(parts, matched)
        if finished:
            part, matched = self._match(self._utf8.decode(b"", True))
            parts.append(part)
            if matched is not None:
                return self._stop(parts, matched)
            parts.append(self._held)
        return TextDelta(text="".join(parts))

    def _bytes_of(self, token_ids: Sequence[int]) -> bytes:
        return b"".join([self._token_bytes(token_id) for token_id in token_ids if token_id not in self._skipped_ids])

    def _match(self, new: str) -> tuple[str, str | None]:
        """Add `new`; returns the text that can be given out, and the stop string that ended it."""
        text, base, stops = self._held + new, self._num_given, self._options.stop
        found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
        for scanner in self._scanners:
            span = scanner.feed(new)
            if span is not None:
                found.append((span[1] - base, span[0] - base, scanner.pattern))
        if found:
            end, start, matched = min(found)
            return text[: end if self._options.no_stop_trim else start], matched
        starts = [len(text) - _overlap(text, stop) for stop in stops]
        given = min(starts + [scanner.pending - base for scanner in self._scanners])
        self._held = text[given:]
        self._num_given += given
        return text[:given], None

    def _stop(self, parts: list[str], matched: str) -> TextDelta:
        self._stopped = True
        return TextDelta(text="".join(parts), stopped=StopMatch(matched=matched, keep_tokens=self._num_tokens))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`, shorter than it."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
