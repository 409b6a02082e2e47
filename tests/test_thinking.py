"""Telling reasoning from answer, by token and by text, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rt.thinking import (
    END_OF_THINKING,
    Part,
    ThinkingSplitter,
    end_of_thinking_ids,
    open_thinking,
    starts_inside,
)

OPEN, CLOSE, OTHER = 1, 2, 3


def split(pieces: list[str], inside: bool) -> ThinkingSplitter:
    """By text. Also checks that the streamed parts add up to the properties."""
    splitter = ThinkingSplitter(inside)
    check_sums(splitter, [*(splitter.feed(OTHER, piece) for piece in pieces), splitter.flush()])
    return splitter


def split_ids(pieces: list[tuple[int, str]], inside: bool) -> ThinkingSplitter:
    splitter = ThinkingSplitter(inside, OPEN, CLOSE)
    check_sums(splitter, [*(splitter.feed(*piece) for piece in pieces), splitter.flush()])
    return splitter


def check_sums(splitter: ThinkingSplitter, parts: list[Part]) -> None:
    assert "".join(part.text for part in parts if part.is_thinking).rstrip("\n") == splitter.reasoning
    assert "".join(part.text for part in parts if not part.is_thinking) == splitter.text


@given(st.lists(st.integers(0, 40)), st.booleans())
def test_any_cut_of_the_text(cuts, inside):
    text = ("" if inside else "\n<think>") + "\nwhy < 3\n</think>\n\nso <b>\n"
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    splitter = split([text[a:b] for a, b in zip(edges, edges[1:], strict=False)], inside)
    assert (splitter.reasoning, splitter.text) == ("why < 3", "so <b>\n")


def test_by_token():
    pieces = [(OPEN, "<think>"), (OTHER, "\nwhy\n"), (CLOSE, "</think>"), (OTHER, "\n\n"), (OTHER, "so")]
    splitter = split_ids(pieces, inside=False)
    assert (splitter.reasoning, splitter.text) == ("why", "so")
    assert (split_ids(pieces[1:], inside=True).reasoning, splitter.is_thinking) == ("why", False)


def test_by_token_written_out_tags_are_text():
    pieces = [(OTHER, "say </think> "), (OTHER, "<think>"), (CLOSE, "</think>"), (OTHER, "<think> is a tag")]
    splitter = split_ids(pieces, inside=True)
    assert (splitter.reasoning, splitter.text) == ("say </think> <think>", "<think> is a tag")


def test_by_token_after_an_incomplete_character():
    splitter = split_ids([(OTHER, "a"), (OTHER, ""), (CLOSE, "\ufffd</think>"), (OTHER, "b")], inside=True)
    assert (splitter.reasoning, splitter.text) == ("a\ufffd", "b")


def test_parts_say_what_they_are():
    splitter = ThinkingSplitter(False, OPEN, CLOSE)
    fed = [(OPEN, "<think>"), (OTHER, "\n"), (OTHER, "why"), (CLOSE, "</think>"), (OTHER, "\n\n"), (OTHER, "so")]
    expected = [("", True), ("", True), ("why", True), ("", True), ("", False), ("so", False)]
    assert [splitter.feed(*piece) for piece in fed] == [Part(*part) for part in expected]


def test_without_thinking_the_text_stays_exact():
    assert (
        split(["\n", "    return", " x <think>y</think>\n"], inside=False).text == "\n    return x <think>y</think>\n"
    )
    assert split(["\n", "<thi"], inside=False).text == "\n<thi"


def test_unfinished_thinking():
    splitter = split(["why", "\n</thi"], inside=True)
    assert (splitter.reasoning, splitter.text, splitter.is_thinking) == ("why\n</thi", "", True)


def test_empty_thinking():
    splitter = split(["<think>\n\n</think>\n\nso"], inside=False)
    assert (splitter.reasoning, splitter.text) == ("", "so")


def test_flush_takes_the_detokenizer_s_rest():
    splitter = ThinkingSplitter(False)
    splitter.feed(OTHER, "a")
    assert (splitter.flush("\ufffd"), splitter.text) == (Part("\ufffd", False), "a\ufffd")


@pytest.mark.parametrize(
    ("prompt", "inside"), [("A<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False)]
)
def test_starts_inside(prompt, inside):
    assert starts_inside(prompt) is inside


@pytest.mark.parametrize("prompt", ["<Assistant>", "<Assistant><think>\n"])
def test_open_thinking(prompt):
    assert open_thinking(prompt, None) == prompt
    assert open_thinking(prompt, True) == "<Assistant><think>\n"
    assert open_thinking(prompt, False) == "<Assistant><think>\n\n</think>\n\n"


def test_end_of_thinking(r1):
    ids = end_of_thinking_ids(r1)
    assert r1.think_close_id in ids
    assert r1.decode(ids) == END_OF_THINKING
