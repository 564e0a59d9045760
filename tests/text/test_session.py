from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam.core.errors import BadRequest
from hornbeam.text.session import StopMatch, TextOptions, TextSession

pytestmark = pytest.mark.pure

TEXTS = st.text(alphabet="ab é東🙂\ufffd", max_size=20)


def flat(chunks):
    return list(chain.from_iterable(chunks))


def run(tokenizer, chunks, **options):
    """The text in all, and the stop match, of feeding `chunks`; the last one finishes."""
    session = TextSession(tokenizer, TextOptions(**options))
    deltas = [session.feed(chunk, finished=i == len(chunks) - 1) for i, chunk in enumerate(chunks)]
    matches = [delta.stopped for delta in deltas if delta.stopped is not None]
    assert len(matches) <= 1
    return "".join(delta.text for delta in deltas), (matches[0] if matches else None)


@st.composite
def chunked(draw, ids):
    """A list of ids, cut anywhere."""
    ids = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(chunks=chunked(st.lists(st.integers(0, 303), max_size=30)), skip=st.booleans())
def test_any_chunking_gives_the_decoded_text(byte_level, chunks, skip):
    text, _ = run(byte_level, chunks, skip_special_tokens=skip)
    assert text == byte_level.decode(flat(chunks), skip_special_tokens=skip)


@given(data=st.data())
def test_any_chunking_gives_the_same_cut(byte_level, data):
    # Random ids as well as spelled text: broken characters, and stop strings that span tokens
    spelled = TEXTS.map(lambda text: byte_level.encode(text, add_special_tokens=False))
    random = st.lists(st.integers(0, 303), max_size=12)
    chunks = data.draw(chunked(st.lists(st.one_of(spelled, random), max_size=3).map(flat)))
    ids = flat(chunks)
    whole = byte_level.decode(ids)
    pieces = st.tuples(st.integers(0, len(whole)), st.integers(1, 5)).map(lambda cut: whole[cut[0] : cut[0] + cut[1]])
    stop = data.draw(st.one_of(pieces, TEXTS).filter(bool))
    text, match = run(byte_level, chunks, stop=(stop,))
    start = whole.find(stop)
    assert text == (whole if start < 0 else whole[:start])
    assert (match is None) == (start < 0)
    if match is not None:
        assert match.matched == stop
        assert stop in byte_level.decode(ids[: match.keep_tokens])
        kept, _ = run(byte_level, chunks, stop=(stop,), no_stop_trim=True)
        assert kept == whole[: start + len(stop)]


@given(
    chunks=chunked(st.text(alphabet="ab", max_size=12).map(lambda text: [ord(char) - ord("a") for char in text])),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_the_first_complete_of_several_stops_wins(chunks, stops):
    class Letters:
        special_ids = frozenset()
        token_bytes = staticmethod(lambda token_id: b"ab"[token_id : token_id + 1])

    whole = "".join("ab"[i] for i in flat(chunks))
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    text, match = run(Letters(), chunks, stop=stops)
    if not ends:
        assert (text, match) == (whole, None)
    else:
        end, _, stop = min(ends)
        assert match == StopMatch(matched=stop, keep_tokens=end)
        assert text == whole[: end - len(stop)]


def test_an_open_character_waits(byte_level):
    session = TextSession(byte_level, TextOptions())
    alphabet = {byte_level.token_bytes(i): i for i in range(3, 300)}
    first, second, third, fourth = (alphabet[bytes([byte])] for byte in "🦫".encode())
    assert session.feed([first, second, third], finished=False).text == ""
    assert session.feed([fourth], finished=False).text == "🦫"
    assert session.feed([first, second], finished=False).text == ""
    assert session.feed([], finished=True).text == "\ufffd"


def test_only_what_may_become_a_stop_string_is_held(byte_level):
    session = TextSession(byte_level, TextOptions(stop=("Paris!",)))
    given_out = [session.feed(byte_level.encode(part), finished=False).text for part in ("is ", "Par", "is", "?")]
    assert given_out == ["is ", "", "", "Paris?"]
    assert session.feed(byte_level.encode("so Par"), finished=True).text == "so Par"


def test_nothing_follows_a_stop(byte_level):
    session = TextSession(byte_level, TextOptions(stop=("Paris",)))
    ids = byte_level.encode("is Paris.")
    delta = session.feed(ids, finished=False)
    assert delta.text == "is "
    assert delta.stopped is not None
    assert delta.stopped.keep_tokens < len(ids)
    late = session.feed(ids, finished=True)
    assert (late.text, late.stopped) == ("", None)


def test_stop_token_is_trimmed_unless_asked_for(byte_level):
    ids = byte_level.encode("Paris.</s>")
    for no_stop_trim, expected in ((False, "Paris."), (True, "Paris.</s>")):
        options = TextOptions(skip_special_tokens=False, no_stop_trim=no_stop_trim)
        assert TextSession(byte_level, options).feed(ids, True, ends_with_stop_token=True).text == expected


def test_byte_fallback_keeps_the_space_behind_the_prompt(byte_fallback):
    ids = [0, 259, 261, 258, *(2 + byte for byte in "é".encode()), 260, 1]
    assert run(byte_fallback, [ids])[0] == " thes é end"
    assert run(byte_fallback, [[i] for i in ids])[0] == " thes é end"
    assert byte_fallback.decode(ids) == "thes é end"


def test_empty_stop_string_is_refused():
    with pytest.raises(BadRequest, match="empty") as error:
        TextOptions(stop=("a", ""))
    assert error.value.field == "stop"
