"""Stop strings: never shown, never missed, nothing else held back, however the text is cut."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.generate.stop import StopMatcher

# Two letters make overlaps, repeats and near misses frequent.
texts = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
cut_lists = st.lists(st.integers(0, 12), max_size=6)


def pieces(text: str, cuts: list[int]) -> list[str]:
    """The text cut at those places; some pieces are empty, as tokens inside a character are."""
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(at)]


def stream(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    """What is shown of a whole stream, and the stop string that ended it."""
    matcher = StopMatcher(stops)
    shown = "".join([matcher.push(part) for part in parts])
    return shown + matcher.flush(), matcher.hit


@settings(max_examples=300)
@given(texts, stop_lists, cut_lists)
def test_shown_text_ends_exactly_where_a_stop_begins(text, stops, cuts):
    """Without a stop in the text all is shown; with one, nothing of it and no other stop is."""
    shown, hit = stream(stops, pieces(text, cuts))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if hit is None:
        assert shown == text
    else:
        assert hit in stops
        assert text.startswith(shown + hit)


@settings(max_examples=300)
@given(texts, stop_lists, cut_lists)
@example("aaab", ["aab"], [3])
@example("abb", ["abb", "b"], [])
@example("abb", ["abb", "ab"], [])
def test_how_the_text_is_cut_makes_no_difference(text, stops, cuts):
    """Tokens are an accident: a stream ends at the first moment its text contains a stop string.

    Of several that are complete at that moment the longest counts, as it shows least.
    """
    shown, hit = text, None
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            hit = max(complete, key=len)
            shown = text[: end - len(hit)]
            break
    assert stream(stops, list(text)) == (shown, hit)
    assert stream(stops, pieces(text, cuts)) == (shown, hit)


@settings(max_examples=300)
@given(texts, stop_lists, cut_lists)
def test_only_the_beginning_of_a_stop_string_is_held_back(text, stops, cuts):
    """And as much of it as there is: what is shown can never become part of a stop."""
    matcher, shown, came = StopMatcher(stops), "", ""
    for part in pieces(text, cuts):
        shown += matcher.push(part)
        came += part
        if matcher.hit is not None:
            return
        beginnings = [stop[:size] for stop in stops for size in range(1, len(stop))]
        held = max((b for b in beginnings if came.endswith(b)), key=len, default="")
        assert shown + held == came


def test_a_stop_across_tokens_by_hand():
    matcher = StopMatcher(["\nUser:"])
    parts = ["Hello", "\n", "\nUs", "er", ": hi", " there"]
    assert [matcher.push(part) for part in parts] == ["Hello", "", "\n", "", "", ""]
    assert matcher.hit == "\nUser:"
    assert matcher.flush() == ""


def test_a_false_alarm_is_released_as_soon_as_it_is_one():
    matcher = StopMatcher(["</s>"])
    assert [matcher.push(part) for part in ["a<", "/", "b", "<"]] == ["a", "", "</b", ""]
    assert matcher.flush() == "<"
    assert matcher.hit is None
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [["ab", "abc"], ["abc", "ab"]])
def test_nothing_after_a_stop_is_shown(stops):
    matcher = StopMatcher(stops)
    assert matcher.push("xxabc") == "xx"
    assert matcher.hit in stops
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_the_first_of_two_stops_counts():
    assert stream(["END", "."], ["One. Two END"]) == ("One", ".")
    assert stream(["END", "."], ["One END two."]) == ("One ", "END")


def test_a_stop_of_one_character_holds_nothing():
    matcher = StopMatcher(["\n"])
    assert matcher.push("line") == "line"
    assert matcher.push(" one\nline two") == " one"
    assert matcher.hit == "\n"


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stops_pass_everything_at_once(stops):
    matcher = StopMatcher(stops)
    assert [matcher.push(part) for part in ["a", "", "bc"]] == ["a", "", "bc"]
    assert matcher.flush() == ""
    assert matcher.hit is None
