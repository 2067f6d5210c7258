"""What `data preview`, `data build` and `data inspect` say of examples, and what must not be trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from tiny_examples import Tiny, build, pairs

from trainwright.base.errors import DataError
from trainwright.data import commands
from trainwright.data.examples.checks import check_trainable
from trainwright.data.examples.preview import _shortened, describe_examples
from trainwright.data.examples.texts import record_texts
from trainwright.data.marking import marked_lines, marked_runs
from trainwright.data.spec import TrainTokenizer
from trainwright.data.tokenizers import train_tokenizer


def test_trained_tokens_are_marked(tmp_path: Path) -> None:
    dataset = build(tmp_path, [{"source": "hello ", "target": "world"}, {"source": "二加二等于", "target": "四"}])
    lines = commands.preview(dataset.folder, rows=2)
    text = "\n".join(lines)
    assert "  hello «world<|endoftext|>»" in text
    assert "  二加二等于«四<|endoftext|>»" in text
    assert "trained text stands in «»" in text
    assert "2 records, 2 examples, 19 tokens (the longest example has 12)" in text
    assert "8 trained labels (42.1% of the tokens)" in text
    assert "<|endoftext|> is trained 2 times" in text
    assert "records.jsonl:2" in text
    colored = "\n".join(commands.preview(dataset.folder, rows=2, color=True))
    assert "\x1b[2mhello \x1b[0m\x1b[32mworld<|endoftext|>\x1b[0m" in colored


def test_classes_are_shown_by_name() -> None:
    tags = np.array([-100, 1, 2, 0, 0, -100], dtype=np.int64)
    assert _shortened(tags, 5, ("O", "B-人", "I-人")) == ". B-人 I-人 O O"
    assert _shortened(tags, 5, ()) == ". 1 2 2x0"
    assert _shortened(np.asarray(1), 9, ("坏", "好")) == "好"
    assert _shortened(np.array([1.0, 0.0, 1.0], dtype=np.float32), 9, ("a", "b", "c")) == "a, c"
    assert _shortened(np.array([0.0, 0.0], dtype=np.float32), 9, ("a", "b")) == "none"


def test_packed_rows_show_their_examples_one_by_one(tmp_path: Path) -> None:
    records = [{"source": f"{name}: ", "target": name * 3} for name in "abcd"]
    dataset = build(tmp_path, records, packing="best_fit")
    text = "\n".join(commands.preview(dataset.folder))
    assert re.search(r"row 0: 4 examples, 28 tokens \(4 padding\), records\.jsonl:1 and others", text)
    assert all(f"  {name}: «{name * 3}<|endoftext|>»" in text for name in "abcd")


def test_long_chinese_rows_stay_within_the_width(tmp_path: Path) -> None:
    dataset = build(tmp_path, [{"source": "天地玄黄宇宙洪荒" * 8, "target": "日月盈昃" * 9}], Tiny(max_length=120))
    for color in (False, True):
        shown = commands.preview(dataset.folder, width=40, color=color)
        body = [re.sub(r"\x1b\[[\d;]*m|[«»]", "", line) for line in shown[shown.index("") :][2:]]
        assert max(cell_len(line) for line in body) <= 42
        assert "".join(line.strip() for line in body).startswith("天地玄黄" + "宇宙洪荒天地玄黄" * 3)


def test_bytes_of_a_character_are_never_torn(tmp_path: Path) -> None:
    """Byte-level tokens cut characters; runs of marked text do not."""
    tokenizer = train_tokenizer("bpe", 257, ["x"])
    ids = tokenizer.encode("你好")
    for cut in range(7):
        runs = marked_runs(tokenizer, ids, [False] * cut + [True] * (6 - cut))
        assert "".join(text for text, _ in runs) == "你好"
        assert "\ufffd" not in "".join(text for text, _ in runs)
    pieces = train_tokenizer("wordpiece", 200, ["the cat sat on the mat"] * 3, min_frequency=1)
    ids = pieces.encode("the cat sat")
    assert marked_runs(pieces, ids, [n > 0 for n in range(len(ids))]) == [("the", False), (" cat sat", True)]


def test_text_cannot_steer_the_terminal() -> None:
    shown = "".join(marked_lines([("a\x1b[31mb\r\n\u202ec", False)], False, 80, 100))
    assert shown == "  a·[31mb␍↵·c"


def test_classes_and_targets_are_shown_with_their_records(tmp_path: Path) -> None:
    dataset = build(tmp_path, [{"text": "ab", "label": "yes", "out": 0}, {"text": "cd", "label": "no"}], Tiny("label"))
    text = "\n".join(commands.preview(dataset.folder, rows=2))
    assert "labels: 1" in text
    assert '{"text": "ab", "label": "yes", "out": 0}' in text
    assert "trained text" not in text
    assert "2 trained labels;" in text


def test_dropped_records_are_listed(tmp_path: Path) -> None:
    records = [*pairs([9] * 9), {"source": "long " * 20, "target": "t"}, {"source": "none", "target": ""}]
    dataset = build(tmp_path, records, max_drop=0.2)
    text = "\n".join(describe_examples(dataset))
    assert "1 records cut (70 tokens), 1 dropped, 0 unreadable" in text
    assert "1 no target" in text
    assert "records.jsonl:11: no target" in text
    assert "10 trained" not in text
    inspected = "\n".join(commands.inspect(dataset.folder))
    assert "every block matches its hash" in inspected
    assert "for train" in inspected


def test_what_trains_nothing_is_refused(tmp_path: Path) -> None:
    cut_off = [{"source": "x" * 40, "target": "answer"}] * 3
    dataset = build(tmp_path, cut_off)
    with pytest.raises(DataError, match=r"none of the 96 tokens of the train split is trained(.|\n)*data preview"):
        check_trainable(dataset)
    assert "training would refuse this: none of the 96 tokens" in "\n".join(commands.preview(dataset.folder))
    assert dataset.facts("train").untrained_examples == 3


def test_an_end_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    def must(token: str) -> tuple[int, ...]:
        tokenizer = build(tmp_path / "first", records).tokenizer()
        found = tokenizer.core.token_to_id(token)
        assert found is not None
        return (found,)

    records: list[dict[str, Any]] = [{"source": "ab", "target": "cd" * 20}] * 3  # the end is cut off
    dataset = build(tmp_path / "a", records, Tiny(options={"must_train_ids": must("<|endoftext|>")}))
    assert list(dataset.facts("train").must_train.values()) == [0]
    with pytest.raises(DataError, match=r"'<\|endoftext\|>' \(token 5\) is never trained(.|\n)*learn to stop"):
        check_trainable(dataset)
    longer = build(tmp_path / "b", records, Tiny(max_length=64, options={"must_train_ids": must("<|endoftext|>")}))
    check_trainable(longer)
    assert "<|endoftext|> ends what is written: trained 3 times" in "\n".join(describe_examples(longer))


@pytest.mark.parametrize(
    ("shape", "record", "texts"),
    [
        ("text", {"text": "a", "where": "x:1"}, ["a"]),
        ("labelled", {"text": "a", "text2": "b", "label": "no"}, ["a", "b"]),
        ("tagged", {"tokens": ["EU", "rejects", "."], "tags": ["B-ORG", "O", "O"]}, ["EU rejects ."]),
        ("tagged", {"tokens": ["我", "在", "IBM", "Inc", "上", "班"]}, ["我在IBM Inc上班"]),
        ("tagged", {"tokens": ["a", "b"], "text": "a-b", "offsets": [[0, 1], [2, 3]]}, ["a-b"]),
        ("relation", {"tokens": ["x", "y"], "head": [0, 1], "tail": [1, 2], "relation": "r"}, ["x y"]),
        (
            "qa",
            {"id": "7", "context": "c", "question": "q", "title": "t", "answers": {"text": ["c"], "answer_start": [0]}},
            ["q", "c"],
        ),
        ("pair", {"source": "s", "target": "t"}, ["s", "t"]),
        ("anchors", {"anchor": "a", "positive": "p", "negatives": ["n", "m"]}, ["a", "p", "n", "m"]),
        ("messages", {"text": "plain"}, ["plain"]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                ],
                "tools": [{"name": "f"}],
            },
            ["hi", "f", "f"],
        ),
    ],
)
def test_the_texts_of_every_shape(shape: str, record: dict[str, Any], texts: list[str]) -> None:
    assert list(record_texts(shape, record)) == texts


# ---- tokenizers for encoders


@pytest.mark.parametrize("kind", ["wordpiece", "word"])
def test_bert_style_tokenizers(tmp_path: Path, kind: str) -> None:
    texts = ["The cats sat, and the cat sat.", "A café 在北京", "the end of cats"] * 4
    tokenizer = train_tokenizer(kind, 400, texts, added=["[E1]"], lowercase=True)
    again = train_tokenizer(kind, 400, texts, added=["[E1]"], lowercase=True)
    assert again.fingerprint == tokenizer.fingerprint
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[E1]"]
    assert [tokenizer.token(n) for n in range(6)] == names
    assert [tokenizer.special_id(role) for role in ("pad", "unk", "cls", "sep", "mask")] == [0, 1, 2, 3, 4]
    assert tokenizer.eos_id is None
    ids = tokenizer.encode("The CATS sat 在北京", add_special=True)
    assert tokenizer.decode(ids) == "the cats sat 在 北 京"
    assert [tokenizer.token(one) for one in ids][-4:] == ["在", "北", "京", "[SEP]"]
    assert tokenizer.encode("café") == tokenizer.encode("cafe")
    assert (tokenizer.unk_id in tokenizer.encode("zebra")) is True
    tokenizer.save(tmp_path / "saved")
    from trainwright.data.tokenizers import load_tokenizer

    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_words_are_kept_by_frequency() -> None:
    texts = ["a b c d"] * 3 + ["a b c"] * 3 + ["a b"]
    tokenizer = train_tokenizer("word", 7, texts)
    assert [tokenizer.token(n) for n in range(5, 7)] == ["a", "b"]
    assert tokenizer.encode("a c") == [5, 1]
    cased = train_tokenizer("word", None, ["The the The"], min_frequency=1)
    assert cased.encode("The the") == [5, 6]
    assert train_tokenizer("word", 100, ["once twice twice"]).vocab_size == 6


def test_transformers_opens_a_trained_wordpiece(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer("wordpiece", 120, ["the cat sat on the mat 北京"] * 3, lowercase=True)
    tokenizer.save(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("The cat sat", "北京 mat"):
        assert opened(text)["input_ids"] == tokenizer.encode(text, add_special=True)
    assert opened.mask_token == "[MASK]"


def test_a_tokenizer_for_other_shapes_of_data_is_trained_too(tmp_path: Path) -> None:
    records = [{"text": "good film", "label": "p"}, {"text": "bad film", "label": "n"}] * 3
    dataset = build(tmp_path, records, Tiny("label"), tokenizer=TrainTokenizer("word", 100, 1, True))
    words = [dataset.tokenizer().token(n) for n in range(5, dataset.vocab_size)]
    assert words == ["film", "bad", "good"]
    assert dataset.batch("train", np.asarray([0]))["input_ids"][0].tolist()[:2] == [7, 5]
