"""Named entities: windows, rows, schemes, decoding, and what comes back of a sentence that was cut."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from labelled_models import TinyModel, collate, encode_all, predictions, train, word_tokenizer

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.load import load_recipe
from trainwright.config.tasks import NERSection
from trainwright.data.examples.example import IGNORE
from trainwright.tasks.labelled_frame import WordPieces, spaces_before
from trainwright.tasks.labelled_tags import allowed, best_allowed, tag_names, write_tags
from trainwright.tasks.labelled_windows import windows_of
from trainwright.tasks.metrics.entities import entities, strict_entities
from trainwright.tasks.ner import NER, NERDefinition
from trainwright.tasks.ner_report import pair_entities

WORDS = [
    "Anna",
    "Berg",
    "lives",
    "in",
    "New",
    "York",
    "and",
    "works",
    "at",
    "Acme",
    "Paris",
    "李",
    "明",
    "在",
    "北",
    "京",
]
TOKENIZER = word_tokenizer(WORDS)

SENTENCES = [
    {"tokens": ["Anna", "Berg", "lives", "in", "New", "York"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["Anna", "works", "at", "Acme"], "tags": ["B-PER", "O", "O", "B-ORG"]},
    {"tokens": ["Paris", "and", "New", "York"], "tags": ["B-LOC", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["李", "明", "在", "北", "京"], "tags": ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]},
]


def bind(records: Any = None, *, tokenizer: Any = TOKENIZER, max_length: int = 24, **options: Any) -> NER:
    definition = NERDefinition(NERSection(name="ner", **options), max_length)
    return definition.bind(definition.survey(iter(records or SENTENCES)), tokenizer)


# --- windows


@pytest.mark.parametrize("seed", range(30))
def test_windows_hold_every_word_and_each_is_answered_for_once(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([1, 1, 2, 3, 5, 9]) for _ in range(rng.randint(1, 60))]
    room = rng.randint(4, 16)
    overlap = rng.randint(0, room - 1)
    windows = windows_of(sizes, room, overlap)
    assert [window.own_first for window in windows][1:] == [window.own_last for window in windows][:-1]
    assert (windows[0].own_first, windows[-1].own_last) == (0, len(sizes))
    for window in windows:
        assert window.first <= window.own_first < window.own_last <= window.last
        assert sum(min(size, room) for size in sizes[window.first : window.last]) <= room
    for left, right in itertools.pairwise(windows):
        assert right.first > left.first
        assert right.last > left.last
        assert sum(sizes[right.first : left.last]) <= overlap


def test_what_two_windows_share_is_halved() -> None:
    windows = windows_of([1] * 10, 6, 4)
    assert [(w.first, w.last) for w in windows] == [(0, 6), (2, 8), (4, 10)]
    assert [(w.own_first, w.own_last) for w in windows] == [(0, 4), (4, 6), (6, 10)]
    assert len(windows_of([1] * 6, 6, 4)) == 1


# --- rows


def test_the_first_token_of_a_word_is_labelled() -> None:
    task = bind()
    record = {"tokens": ["Anna", "Yorkin"], "tags": ["B-PER", "I-PER"]}  # Yorkin is spelled in pieces
    arrays = task.encoder.encode(record).examples[0].arrays
    pieces = TOKENIZER.encode("Yorkin")
    assert len(pieces) > 1
    index = {tag: number for number, tag in enumerate(task.tags)}
    rest = [IGNORE] * (len(pieces) - 1)
    assert arrays["labels"].tolist() == [IGNORE, index["B-PER"], index["I-PER"], *rest, IGNORE]
    assert arrays["word_mask"].tolist() == [0, 1, 1, *([0] * (len(pieces) - 1)), 0]
    assert arrays["input_ids"].tolist() == TOKENIZER.core.encode("Anna Yorkin").ids
    last = bind(label_on="last").encoder.encode(record).examples[0].arrays["labels"].tolist()
    assert last == [IGNORE, index["B-PER"], *rest, index["I-PER"], IGNORE]
    every = bind(label_on="all").encoder.encode({"tokens": ["Yorkin"], "tags": ["B-PER"]}).examples[0].arrays["labels"]
    assert every.tolist() == [IGNORE, index["B-PER"], *([index["I-PER"]] * (len(pieces) - 1)), IGNORE]


def test_types_may_have_any_name_where_all_tokens_of_a_word_are_labelled() -> None:
    records = [{"tokens": ["Anna", "Yorkin"], "tags": ["B-SUB-B-X", "I-SUB-B-X"]}]  # B- stands inside the type
    task = bind(records, label_on="all")
    labels = task.encoder.encode(records[0]).examples[0].arrays["labels"]
    assert [task.tags[label] for label in labels[1:-1]] == ["B-SUB-B-X"] + ["I-SUB-B-X"] * (len(labels) - 3)


def test_a_decoders_words_are_labelled_at_their_last_token() -> None:
    plain = word_tokenizer(WORDS, framed=False)
    arrays = bind(tokenizer=plain, frame="decoder").encoder.encode(SENTENCES[1]).examples[0].arrays
    assert len(arrays["input_ids"]) == 4
    assert bind(tokenizer=plain, frame="decoder").encoder.label_on == "last"  # type: ignore[attr-defined]
    assert bind().encoder.label_on == "first"  # type: ignore[attr-defined]


def test_words_have_the_ids_of_their_text(shared_data: Any) -> None:
    from trainwright.data.tokenizers import load_tokenizer

    words = ["Hello", ",", "wörld", "don't", "中", "国", "人", "A", "4", "%"]
    text = "Hello , wörld don't 中国人A 4 %"
    assert spaces_before(words) == [False, True, True, True, False, False, False, False, True, True]
    for name in ("bert_vocab/bert-base-cased-vocab.txt", "gpt2_tokenizer"):
        tokenizer = load_tokenizer(shared_data(name))
        pieces = WordPieces(tokenizer)
        spaced = spaces_before(words)
        ids = [i for word, space in zip(words, spaced, strict=True) for i in pieces.ids(word, space)]
        # " 中" after a letter: the words stand without a space beside a Chinese character
        assert ids == tokenizer.encode(text.replace("don't 中", "don't中"), parse_special=False)
    llama = WordPieces(load_tokenizer(shared_data("llama2_tokenizer")))
    assert llama.ids("word", True) == llama.tokenizer.encode("word")
    assert len(llama.ids("中", False)) == 1


def test_a_word_that_the_tokenizer_leaves_out_still_has_a_token() -> None:
    task = bind()
    arrays = task.encoder.encode({"tokens": ["\u200b", "Anna"]}).examples[0].arrays
    assert arrays["word_mask"].sum() == 2


def test_spaces_are_those_of_the_text_where_it_is_kept() -> None:
    tokenizer = word_tokenizer(["ab", "a", "b"], framed=False)
    task = bind([{"tokens": ["a"], "tags": ["B-X"]}], tokenizer=tokenizer, frame="decoder")
    record = {"tokens": ["a", "b"], "text": "ab", "offsets": [[0, 1], [1, 2]]}
    assert task.encoder.encode(record).examples[0].arrays["input_ids"].tolist() == [
        *tokenizer.encode("a"),
        *tokenizer.encode("b"),
    ]


def test_long_sentences_are_cut_at_words_and_put_together_again() -> None:
    rng = random.Random(0)
    words = [rng.choice(WORDS) for _ in range(50)]
    kinds = {"Anna": "PER", "Berg": "PER", "Paris": "LOC", "Acme": "ORG"}
    tags = [f"B-{kinds[word]}" if word in kinds else "O" for word in words]
    record = {"tokens": words, "tags": tags}
    task = bind([*SENTENCES, record], max_length=12)
    encoded = task.encoder.encode(record)
    assert len(encoded.examples) > 3
    assert encoded.cut_tokens == 0
    labelled = sum(int((example.arrays["labels"] != IGNORE).sum()) for example in encoded.examples)
    assert labelled == 50  # every word is trained once, however many windows read it
    assert [example.piece.index for example in encoded.examples] == list(range(len(encoded.examples)))
    # outputs that say what the labels say come back as the tags of the sentence
    index = {tag: number for number, tag in enumerate(task.tags)}
    outputs: dict[str, list[Any]] = {"tags": [], "word_mask": [], "pieces": []}
    for example in encoded.examples:
        mask = example.arrays["word_mask"]
        first = example.piece.facts["first"]
        found = np.zeros(len(mask) + 3, dtype=np.int32)  # padded, as rows of a batch are
        found[np.flatnonzero(mask)] = [index[tag] for tag in tags[first : first + int(mask.sum())]]
        outputs["tags"].append(found)
        outputs["word_mask"].append(np.pad(mask, (0, 3)))
        outputs["pieces"].append(example.piece)
    assert task.predict([record], [outputs])[0]["tags"] == tags


def test_a_word_longer_than_a_row_is_cut_and_counted() -> None:
    task = bind(max_length=8)
    encoded = task.encoder.encode({"tokens": ["Anna", "Y" * 20, "Berg"]})
    assert encoded.cut_tokens == 14
    assert all(example.length <= 8 for example in encoded.examples)
    assert sum(example.piece.facts["own"][1] - example.piece.facts["own"][0] for example in encoded.examples) == 3


def test_errors_of_records() -> None:
    task = bind()
    with pytest.raises(DataError, match=r"f:3: 1 tags for 2 words"):
        task.encoder.encode({"tokens": ["a", "b"], "tags": ["O"], "where": "f:3"})
    with pytest.raises(DataError, match=r"type of entity 'LOK' is none of the 3 .*LOC \(4\)"):
        task.encoder.encode({"tokens": ["a"], "tags": ["B-LOK"]})
    assert task.encoder.encode({"tokens": []}).dropped == "there are no words"
    with pytest.raises(DataError, match="no training record has tags"):
        bind([{"tokens": ["a"]}])
    with pytest.raises(ConfigError, match="2 tokens stand around"):
        bind(max_length=3)
    mapped = bind(unseen_as="LOC").encoder.encode({"tokens": ["a"], "tags": ["B-X"]}).examples[0].arrays["labels"]
    assert bind().tags[mapped[1]] == "B-LOC"
    nothing = bind(unseen_as="O").encoder.encode({"tokens": ["a"], "tags": ["B-X"]}).examples[0].arrays["labels"]
    assert nothing[1] == 0


def test_tags_in_another_scheme_are_read_as_what_they_mean() -> None:
    task = bind()
    iob1 = task.encoder.encode({"tokens": ["New", "York", "Anna"], "tags": ["I-LOC", "I-LOC", "I-PER"]})
    iob2 = task.encoder.encode({"tokens": ["New", "York", "Anna"], "tags": ["B-LOC", "I-LOC", "B-PER"]})
    assert np.array_equal(iob1.examples[0].arrays["labels"], iob2.examples[0].arrays["labels"])


def test_the_encoder_crosses_processes_and_says_what_it_does() -> None:
    task = bind()
    copy = pickle.loads(pickle.dumps(task.encoder))
    for record in SENTENCES:
        first, second = (e.encode(record).examples[0].arrays for e in (task.encoder, copy))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    others = [
        bind(max_length=20),
        bind(scheme="bioes"),
        bind(label_on="last"),
        bind(overlap=1),
        bind(labels=["PER", "LOC", "ORG"]),
        bind(unseen_as="O"),
        bind(frame="decoder"),
    ]
    assert len({task.encoder.fingerprint, *(other.encoder.fingerprint for other in others)}) == 8
    assert bind(crf=True, constrained=False).encoder.fingerprint == task.encoder.fingerprint


# --- schemes and decoding


def test_tags_are_written_and_read_back_in_both_schemes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        raw = [
            "O" if rng.random() < 0.4 else f"{rng.choice('BI')}-{rng.choice('XY')}" for _ in range(rng.randint(1, 9))
        ]
        spans = entities(raw)
        bio, bioes = write_tags(spans, len(raw)), write_tags(spans, len(raw), "bioes")
        assert entities(bio) == entities(bioes) == spans
        assert strict_entities(bio, "IOB2") == strict_entities(bioes, "IOBES") == spans


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_constrained_decoding_is_the_best_of_all_sequences_that_are_allowed(scheme: str) -> None:
    names = tag_names(["X", "Y"], scheme)
    table, begin, end = allowed(names)
    torch.manual_seed(0)
    for words in (1, 2, 3):
        scores = torch.randn(2, words + 2, len(names)) * 2
        mask = torch.zeros(2, words + 2, dtype=torch.bool)
        mask[0, 1 : words + 1] = True
        mask[1, [0, *range(2, words + 1)]] = True  # tokens between words are left out
        for edges in (None, torch.tensor([[1, 0], [0, 1]])):
            found = best_allowed(scores, mask, names, edges)
            for row in range(2):
                log_probs = scores[row][mask[row]].log_softmax(-1)
                begins, ends = (True, True) if edges is None else map(bool, edges[row].tolist())
                best, chosen = -1e9, ()
                for path in itertools.product(range(len(names)), repeat=words):
                    fits = all(table[a, b] for a, b in itertools.pairwise(path))
                    fits = fits and (not begins or bool(begin[path[0]])) and (not ends or bool(end[path[-1]]))
                    value = float(sum(log_probs[i, tag] for i, tag in enumerate(path)))
                    if fits and value > best:
                        best, chosen = value, path
                assert found[row][mask[row]].tolist() == list(chosen)
                assert (found[row][~mask[row]] == 0).all()


def test_decoding_never_gives_a_sequence_that_the_scheme_does_not_have() -> None:
    torch.manual_seed(1)
    for scheme, strict in (("bio", "IOB2"), ("bioes", "IOBES")):
        names = tag_names(["X", "Y"], scheme)
        found = best_allowed(torch.randn(40, 9, len(names)) * 5, torch.ones(40, 9, dtype=torch.bool), names)
        for row in found.tolist():
            tags = [names[tag] for tag in row]
            assert strict_entities(tags, strict) == entities(tags)


# --- learning, predictions, reports


@pytest.mark.parametrize("options", [{}, {"scheme": "bioes"}, {"crf": True}, {"crf": True, "scheme": "bioes"}])
def test_a_model_learns_predicts_and_is_reported_on(options: dict[str, Any]) -> None:
    task = bind(**options)
    assert task.head is not None
    assert (task.head.kind, task.head.crf) == ("token", bool(options.get("crf")))
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    assert train(task, model, SENTENCES, steps=60) < 0.1
    given = predictions(task, model, [{"tokens": record["tokens"]} for record in SENTENCES])
    assert [prediction["tags"] for prediction in given] == [record["tags"] for record in SENTENCES]
    assert given[0]["entities"] == [
        {"type": "PER", "start": 0, "end": 2, "text": "Anna Berg"},
        {"type": "LOC", "start": 4, "end": 6, "text": "New York"},
    ]
    assert given[3]["entities"][1]["text"] == "北京"
    report = task.report(SENTENCES, given)
    assert report.metrics[task.best.name] == report.metrics["token_accuracy"] == 1.0
    assert report.errors == ()


def test_loss_is_counted_in_words_and_is_the_same_in_micro_batches() -> None:
    for options in ({}, {"crf": True}):
        task = bind(**options)
        examples, _, _ = encode_all(task.encoder, SENTENCES)
        model = TinyModel(task.head, TOKENIZER.vocab_size)
        whole = task.loss(model, collate(task.encoder.features, examples))
        parts = [task.loss(model, collate(task.encoder.features, [example])) for example in examples]
        assert int(whole.count) == sum(int(part.count) for part in parts) == 19
        total = sum(float(part.loss_sum.detach()) for part in parts)
        assert float(whole.loss_sum.detach()) == pytest.approx(total, rel=1e-5)


def test_wrong_entities_are_named_by_what_is_wrong() -> None:
    true = [("PER", 0, 1), ("LOC", 3, 4), ("ORG", 6, 7), ("ORG", 9, 9), ("PER", 11, 12)]
    given = [("LOC", 0, 1), ("LOC", 4, 4), ("PER", 7, 8), ("LOC", 14, 14), ("PER", 11, 12)]
    assert list(pair_entities(true, given)) == [
        ("wrong type", true[0], given[0]),
        ("wrong borders", true[1], given[1]),
        ("wrong type and borders", true[2], given[2]),
        ("missed", true[3], None),
        ("spurious", None, given[3]),
    ]


def test_the_report_lists_errors_with_their_sentence() -> None:
    task = bind()
    given = [{"tags": ["B-PER", "O", "O", "O", "B-LOC", "I-LOC"]}, {"tags": ["O", "O", "O", "B-PER"]}]
    records = [{**SENTENCES[0], "where": "f:1"}, SENTENCES[1]]
    report = task.report(records, given)
    assert report.errors[0] == {
        "where": "f:1",
        "kind": "wrong borders",
        "expected": "PER: Anna Berg",
        "predicted": "PER: Anna",
        "text": "Anna Berg lives in New York",
    }
    assert [error["kind"] for error in report.errors] == ["wrong borders", "wrong type", "missed"]
    assert report.tables[1].rows[:2] == (("wrong type", 1), ("wrong borders", 1))
    assert report.metrics["precision"] == pytest.approx(1 / 3)
    assert report.metrics["recall"] == pytest.approx(1 / 4)
    assert report.labels == ("O", "LOC", "ORG", "PER")
    assert report.confusion is not None
    assert np.asarray(report.confusion).sum() == 10


def test_options_that_do_not_go_together() -> None:
    base = "model: {preset: gpt2-nano}\ndata: {source: x}\ntask: "
    for task in ("{name: ner, crf: true, label_on: all}", "{name: ner, scheme: bioes, label_on: all}"):
        with pytest.raises(ConfigError, match="label_on"):
            load_recipe_text(base + task)


def load_recipe_text(text: str) -> Any:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)
