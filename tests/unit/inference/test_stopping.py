"""Stop strings, wherever text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.inference.stopping import StopScanner


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    text = "".join(scanner.push(piece) for piece in pieces) + scanner.finish()
    return text, scanner.found


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "found"),
    [
        (["ab", "cd"], ("bc",), "a", "bc"),
        (["你", "好，世", "界。再", "见"], ("世界。",), "你好，", "世界。"),
        (["a<", "|e", "nd|", ">x"], ("<|end|>",), "a", "<|end|>"),
        (["a<", "|e", "n"], ("<|end|>",), "a<|en", None),
        (["xaab"], ("aab", "xa"), "", "xa"),
        (["abc"], ("b", "bc"), "a", "bc"),
        (["aaab"], ("aab",), "a", "aab"),
        (["plain"], (), "plain", None),
    ],
)
def test_cases(pieces: list[str], stops: tuple[str, ...], text: str, found: str | None) -> None:
    assert run(stops, pieces) == (text, found)


@given(
    st.text("ab你", max_size=30), st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=3), st.data()
)
def test_result_does_not_depend_on_the_cuts(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    cut_text, cut_found = run(tuple(stops), pieces)
    first = min((text.find(stop) for stop in stops if stop in text), default=None)
    if cut_found is None:
        assert first is None
        assert cut_text == text
    else:
        assert text.startswith(cut_text + cut_found)
        assert not any(stop in cut_text for stop in stops)


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    scanner = StopScanner(("###",))
    assert [scanner.push(piece) for piece in ("a#", "#", "b", "##", "#", "c")] == ["a", "", "##b", "", "", ""]
    assert scanner.found == "###"
