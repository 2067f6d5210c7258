"""Streaming decoding never shows a broken or retracted character, and adds up to the decoding of all ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXT = "Once 你好，世界！😀👨‍👩‍👧 é ½\n\n  indented\tdone 龘龘龘 🀄🀄 end"
NAMES = {
    "llama2": "llama2_tokenizer",
    "gpt2": "gpt2_tokenizer",
    "bert": "bert_vocab/bert-base-chinese-vocab.txt",
    "stories": "stories260K/tok512.bin",
}
_cache: dict[str, Tokenizer] = {}


def tokenizer_named(name: str, shared_data: Callable[[str], Path]) -> Tokenizer:
    if name not in _cache:
        _cache[name] = (
            load_tokenizer(shared_data(NAMES[name])) if name in NAMES else train_tokenizer(name, 300, ["abc 你好 def"])
        )
    return _cache[name]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("name", ["bpe", "char", *NAMES])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_any_ids_add_up(
    shared_data: Callable[[str], Path], name: str, skip_special: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizer_named(name, shared_data)
    low = st.integers(0, min(tokenizer.vocab_size, 300) - 1)  # bytes and special tokens live here
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size - 1)), max_size=40))
    stream = tokenizer.stream(skip_special=skip_special)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("name", ["bpe", *NAMES])
def test_real_text_streams_without_broken_characters(shared_data: Callable[[str], Path], name: str) -> None:
    tokenizer = tokenizer_named(name, shared_data)
    ids = tokenizer.encode(TEXT)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    if name != "bert":
        assert tokenizer.decode(ids) == TEXT
    stream = tokenizer.stream()
    assert stream.push_many(ids) + stream.finish() == tokenizer.decode(ids)
    assert stream.push_many(ids) + stream.finish() == tokenizer.decode(ids)  # as new after finish


def test_text_comes_as_soon_as_it_is_certain(shared_data: Callable[[str], Path]) -> None:
    tokenizer = tokenizer_named("gpt2", shared_data)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("Hi there 你 x")]
    assert pieces[:2] == ["Hi", " there"]
    assert pieces[-1] == " x"
    assert "你" in "".join(pieces[2:-1])


def test_broken_bytes_at_the_end_show_as_replacement(shared_data: Callable[[str], Path]) -> None:
    tokenizer = tokenizer_named("gpt2", shared_data)
    ids = tokenizer.encode("ok 龘")[:-1]
    stream = tokenizer.stream()
    shown = stream.push_many(ids)
    assert shown == "ok "
    assert stream.finish() == "\ufffd"


def test_a_long_stream_costs_a_window_per_token(shared_data: Callable[[str], Path]) -> None:
    tokenizer = tokenizer_named("gpt2", shared_data)
    stream = tokenizer.stream()
    for token in tokenizer.encode("word and 你好 " * 500):
        stream.push(token)
        assert len(stream._window) < 12
