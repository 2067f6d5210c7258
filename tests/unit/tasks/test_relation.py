"""Relations: markers, rows, what is kept of long sentences, and reports in the official way."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
from labelled_models import TinyModel, predictions, train, word_tokenizer

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks import RelationSection
from trainwright.data.examples.example import IGNORE
from trainwright.tasks.relation import MARKERS, Relation, RelationDefinition, marked_text, marker_ids

WORDS = [*["the", "fire", "caused", "by", "a", "spark", "was", "in", "big", "box", "of", "toys"], *"0123456789"]
TOKENIZER = word_tokenizer(WORDS, extra=MARKERS)

RECORDS = [
    {
        "tokens": ["a", "fire", "caused", "by", "a", "spark"],
        "head": [1, 2],
        "tail": [5, 6],
        "relation": "Cause(e2,e1)",
    },
    {"tokens": ["a", "spark", "caused", "the", "fire"], "head": [1, 2], "tail": [4, 5], "relation": "Cause(e1,e2)"},
    {"tokens": ["the", "toys", "was", "in", "a", "box"], "head": [1, 2], "tail": [5, 6], "relation": "In(e1,e2)"},
    {"tokens": ["a", "box", "of", "toys"], "head": [1, 2], "tail": [3, 4], "relation": "In(e2,e1)"},
    {"tokens": ["the", "spark", "was", "big"], "head": [1, 2], "tail": [3, 4], "relation": "Other"},
]


def bind(records: Any = None, *, tokenizer: Any = TOKENIZER, max_length: int = 24, **options: Any) -> Relation:
    definition = RelationDefinition(RelationSection(name="relation", **options), max_length)
    return definition.bind(definition.survey(iter(records or RECORDS)), tokenizer)


def row(task: Relation, record: Any, tokenizer: Any = TOKENIZER) -> tuple[str, list[int], int]:
    """Tokens as text, the marked places, and the label."""
    arrays = task.encoder.encode(record).examples[0].arrays
    text = " ".join(tokenizer.token(int(i)) or "" for i in arrays["input_ids"])
    return text, arrays["entity_starts"].tolist(), int(arrays["labels"])


def test_entities_stand_between_markers_and_their_places_are_known() -> None:
    text, starts, label = row(bind(), RECORDS[0])
    assert text == "[CLS] a [E1] fire [/E1] caused by a [E2] spark [/E2] [SEP]"
    assert [text.split()[start] for start in starts] == ["[E1]", "[E2]"]
    assert bind().labels.names[label] == "Cause(e2,e1)"
    swapped = {**RECORDS[0], "head": [5, 6], "tail": [1, 2]}
    text, starts, _ = row(bind(), swapped)
    assert text == "[CLS] a [E2] fire [/E2] caused by a [E1] spark [/E1] [SEP]"
    assert [text.split()[start] for start in starts] == ["[E1]", "[E2]"]


def test_a_decoder_is_read_behind_the_entities() -> None:
    plain = word_tokenizer(WORDS, framed=False, extra=MARKERS)
    text, starts, _ = row(bind(tokenizer=plain, frame="decoder"), RECORDS[1], plain)
    assert text == "a [E1] spark [/E1] caused the [E2] fire [/E2]"
    assert [text.split()[start] for start in starts] == ["[/E1]", "[/E2]"]


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        ([0, 3], [1, 2], "[E1] 0 [E2] 1 [/E2] 2 [/E1] 3"),
        ([1, 2], [1, 3], "0 [E2] [E1] 1 [/E1] 2 [/E2] 3"),
        ([2, 3], [1, 3], "0 [E2] 1 [E1] 2 [/E1] [/E2] 3"),
        ([1, 2], [1, 2], "0 [E1] [E2] 1 [/E2] [/E1] 2 3"),
        ([0, 2], [1, 3], "[E1] 0 [E2] 1 [/E1] 2 [/E2] 3"),
        ([0, 1], [1, 2], "[E1] 0 [/E1] [E2] 1 [/E2] 2 3"),
    ],
)
def test_entities_inside_each_other(head: list[int], tail: list[int], expected: str) -> None:
    record = {"tokens": list("0123"), "head": head, "tail": tail}
    text, starts, label = row(bind(), record)
    assert text == f"[CLS] {expected} [SEP]"
    assert [text.split()[start] for start in starts] == ["[E1]", "[E2]"]
    assert label == IGNORE


@pytest.mark.parametrize("seed", range(20))
def test_of_a_long_sentence_the_entities_and_what_is_near_them_stay(seed: int) -> None:
    rng = random.Random(seed)
    words = [str(rng.randrange(10)) for _ in range(40)]
    head, tail = sorted(rng.sample(range(40), 2))
    record = {"tokens": words, "head": [head, head + 1], "tail": [tail, tail + 1]}
    task = bind(max_length=20)
    encoded = task.encoder.encode(record)
    arrays = encoded.examples[0].arrays
    assert len(arrays["input_ids"]) == 20
    assert encoded.cut_tokens == 40 - (20 - 2 - 4)
    tokens = [TOKENIZER.token(int(i)) for i in arrays["input_ids"]]
    for marker, place, start in zip(("[E1]", "[E2]"), (head, tail), arrays["entity_starts"], strict=True):
        assert tokens[start] == marker
        assert tokens[start + 1] == words[place]


def test_entities_that_do_not_fit_drop_the_record() -> None:
    record = {"tokens": list("0123456789") * 3, "head": [0, 20], "tail": [20, 30]}
    assert bind(max_length=20).encoder.encode(record).dropped == "its two entities do not fit into 20 tokens"
    with pytest.raises(ConfigError, match="need at least 8"):
        bind(max_length=7)


def test_markers_of_tokenizers_without_them(shared_data: Any) -> None:
    from trainwright.data.tokenizers import load_tokenizer

    assert marker_ids(TOKENIZER) == tuple((TOKENIZER.core.token_to_id(marker),) for marker in MARKERS)
    bert = load_tokenizer(shared_data("bert_vocab/bert-base-uncased-vocab.txt"))
    assert marker_ids(bert) == ((2,), (3,), (4,), (5,))  # [unused1] to [unused4]
    gpt2 = load_tokenizer(shared_data("gpt2_tokenizer"))
    assert marker_ids(gpt2) == tuple(tuple(gpt2.encode(sign)) for sign in "@@##")


def test_what_a_trained_tokenizer_gets() -> None:
    definition = RelationDefinition(RelationSection(name="relation"), 64)
    assert definition.special_tokens == MARKERS
    framed = RelationDefinition(RelationSection(name="relation", frame="encoder"), 64)
    assert framed.special_tokens[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_errors_of_records_and_options() -> None:
    task = bind()
    with pytest.raises(DataError, match=r"s:4: tail is words \[5, 9\) of 2"):
        task.encoder.encode({"tokens": ["a", "b"], "head": [0, 1], "tail": [5, 9], "where": "s:4"})
    with pytest.raises(DataError, match=r"the relation 'Cause' is none of the 5 .*Cause\(e1,e2\) \(1\)"):
        task.encoder.encode({**RECORDS[0], "relation": "Cause"})
    mapped = bind(unseen_as="Other")
    assert row(mapped, {**RECORDS[0], "relation": "Cause"})[2] == mapped.labels.names.index("Other")
    with pytest.raises(ConfigError, match=r"task.other is 'Othre'.*Did you mean 'Other'"):
        bind(other="Othre")
    assert (bind().other, bind(other=None).other, bind(other="In(e1,e2)").other) == ("Other", None, "In(e1,e2)")
    assert bind([{**RECORDS[0], "relation": "x"}]).other is None


def test_the_encoder_crosses_processes_and_says_what_it_does() -> None:
    task = bind()
    copy = pickle.loads(pickle.dumps(task.encoder))
    for record in RECORDS:
        first, second = (e.encode(record).examples[0].arrays for e in (task.encoder, copy))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    labels = sorted(bind().labels.names, reverse=True)
    others = [
        bind(max_length=20),
        bind(labels=labels),
        bind(unseen_as="Other"),
        bind(frame="decoder"),
        bind(tokenizer=word_tokenizer(WORDS)),
    ]
    assert len({task.encoder.fingerprint, *(other.encoder.fingerprint for other in others)}) == 6
    assert bind(r_drop=1.0, other=None).encoder.fingerprint == task.encoder.fingerprint


@pytest.mark.parametrize("options", [{}, {"class_weights": "auto", "label_smoothing": 0.01, "r_drop": 0.5}])
def test_a_model_learns_predicts_and_is_reported_on(options: dict[str, Any]) -> None:
    task = bind(**options)
    assert task.head is not None
    assert task.head.kind == "entities"
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    train(task, model, RECORDS, steps=80)
    bare = [{key: value for key, value in record.items() if key != "relation"} for record in RECORDS]
    given = predictions(task, model, bare)
    assert [prediction["relation"] for prediction in given] == [record["relation"] for record in RECORDS]
    assert given[0]["tokens"] == RECORDS[0]["tokens"]
    report = task.report(RECORDS, given)
    assert report.metrics[task.best.name] == report.metrics["accuracy"] == 1.0
    assert [entry[0] for entry in report.tables[0].rows] == ["Cause", "In", "micro avg", "macro avg"]
    assert report.errors == ()


def test_the_report_lists_errors_with_marked_sentences() -> None:
    task = bind()
    wrong = {"relation": "Cause(e1,e2)", "probability": {"Cause(e1,e2)": 0.8}}
    report = task.report([{**RECORDS[0], "id": "7"}], [wrong])
    assert report.errors == (
        {
            "id": "7",
            "text": "a [E1] fire [/E1] caused by a [E2] spark [/E2]",
            "expected": "Cause(e2,e1)",
            "predicted": "Cause(e1,e2)",
            "probability": 0.8,
        },
    )
    assert report.metrics["f1_macro"] == 0.0
    assert marked_text(RECORDS[3]) == "a [E1] box [/E1] of [E2] toys [/E2]"
    with pytest.raises(DataError, match="no record has a relation"):
        task.report([{"tokens": ["a"]}], [wrong])
