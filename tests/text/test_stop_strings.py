"""Stop strings against their definition, however the text is divided."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.sampling_params import MAX_STOP_CHARACTERS
from jaxengine.text.stop_strings import Stop, StopStrings


def naive_stop(strings: list[str], text: str, start: int) -> Stop | None:
    """The first that ends after `start`, and of those that end together the longest."""
    for end in range(start + 1, len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            return Stop(max(ending, key=len), end - start)
    return None


def naive_held(strings: list[str], text: str) -> str:
    """The longest end of the text that begins a longer stop string."""
    beginnings = {string[:cut] for string in strings for cut in range(len(string))}
    return max((beginning for beginning in beginnings if text.endswith(beginning)), key=len)


@st.composite
def nested_strings(draw) -> list[str]:
    """Strings of few letters, and some that begin, end, repeat or prolong them."""
    strings = draw(st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=4))
    string = draw(st.sampled_from(strings))
    related = [string[1:] or "a", string[:-1] or "b", string * 3, string + "a"]
    return strings + draw(st.lists(st.sampled_from(related)))


@settings(max_examples=600, deadline=None)
@given(nested_strings(), st.lists(st.text("ab€", max_size=8), max_size=20))
def test_what_is_found_and_held_is_that_of_the_definition(strings, pieces):
    stops, text = StopStrings(strings), ""
    for piece in pieces:
        assert stops.add(piece) == naive_stop(strings, text + piece, len(text))
        text += piece
        assert stops.held == naive_held(strings, text)


def test_a_long_text_at_once_gives_what_its_characters_give():
    strings, text = ["a" * MAX_STOP_CHARACTERS, "ba" * 400 + "c"], "ba" * 3_000 + "a" * 2_000
    at_once, one_by_one = StopStrings(strings), StopStrings(strings)
    first = next(index for index, character in enumerate(text, 1) if one_by_one.add(character))
    assert at_once.add(text) == Stop(strings[0], first)
    assert first == 6_000 + MAX_STOP_CHARACTERS - 1
    assert len(at_once.held) == MAX_STOP_CHARACTERS - 1


def test_the_comparisons_for_what_is_held_are_linear_in_the_text(monkeypatch):
    """Counted, not timed: a character adds at most one to what is held, and each further comparison takes one away."""
    compared, may_grow = itertools.count(), StopStrings._may_grow

    def counted(stops: StopStrings, beginning: str) -> bool:
        next(compared)
        return may_grow(stops, beginning)

    monkeypatch.setattr(StopStrings, "_may_grow", counted)
    stops = StopStrings(["a" * 1_000 + "c", "ab" * 500 + "c", "aX"])
    text = ("a" * 700 + "b" + "ab" * 600) * 5
    for character in text:
        stops.add(character)
    assert next(compared) <= 2 * len(text)
