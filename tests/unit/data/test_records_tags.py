"""Tag schemes are recognised over a file, and converted exactly in both directions."""

from __future__ import annotations

import random

import pytest

from trainwright.base.errors import DataError
from trainwright.data.records.tags import SCHEMES, convert_tags, detect_scheme, tags_of, to_spans, violations
from trainwright.data.records.words import join_words, parts_of_tags, split_words, tags_of_parts

TAGS = {
    "iob2": "B-PER I-PER B-PER O B-LOC",
    "iob1": "I-PER I-PER B-PER O I-LOC",
    "bioes": "B-PER E-PER S-PER O S-LOC",
    "bmes": "B-PER E-PER S-PER O S-LOC",
    "bilou": "B-PER L-PER U-PER O U-LOC",
}
SPANS = [(0, 2, "PER"), (2, 3, "PER"), (4, 5, "LOC")]


@pytest.mark.parametrize("scheme", TAGS)
def test_every_scheme_says_the_same_entities(scheme: str) -> None:
    tags = TAGS[scheme].split()
    assert to_spans(tags, scheme) == SPANS
    assert tags_of(SPANS, 5, scheme) == tags
    assert violations(tags, scheme) == []
    for other, written in TAGS.items():
        assert convert_tags(tags, scheme, other) == written.split()


def test_long_entities_of_the_schemes_with_ends() -> None:
    assert tags_of([(0, 4, "X")], 4, "bmes") == ["B-X", "M-X", "M-X", "E-X"]
    assert tags_of([(0, 4, "X")], 4, "bioes") == ["B-X", "I-X", "I-X", "E-X"]
    assert tags_of([(0, 4, "X")], 4, "bilou") == ["B-X", "I-X", "I-X", "L-X"]
    assert convert_tags(["B-X", "M-X", "E-X"], "bmes") == ["B-X", "I-X", "I-X"]


def test_conversion_both_ways_loses_nothing_on_random_sentences() -> None:
    draw = random.Random(3)
    for _ in range(300):
        words, at, spans = draw.randint(1, 12), 0, []
        while at < words:
            end = min(words, at + draw.randint(1, 3))
            if draw.random() < 0.6:
                spans.append((at, end, draw.choice(["A", "B-C", ""])))
            at = end
        for scheme in TAGS:
            if scheme in ("bmes", "bilou", "bioes", "iob2", "iob1"):
                tags = tags_of(spans, words, scheme)
                assert to_spans(tags, scheme) == spans
                assert violations(tags, scheme) == []
                assert convert_tags(convert_tags(tags, scheme, "iob2"), "iob2", scheme) == tags


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["O O", "B-A I-A O"], "iob2"),
        (["O O", "I-A I-A O", "I-A B-A"], "iob1"),
        (["I-A O"], "iob1"),  # only I-: neighbours of one type are one entity under every reading
        (["B-A I-A", "B-A I-A", "B-A", "O I-A"], "iob2"),  # one slip in a file of BIO
        (["B-A E-A", "S-A"], "bioes"),
        (["B-A E-A", "B-A M-A E-A"], "bmes"),
        (["B-A L-A", "U-A"], "bilou"),
        (["PER PER O"], "io"),
        (["DT NN VB"], "words"),
        (["O O", ""], "io"),
        (["B-A I-A", "B-A PER"], "iob2"),  # a slip that is reported where it stands, not a scheme
        (["B I O"], "iob2"),
    ],
)
def test_the_scheme_is_found_over_the_whole_file(sentences: list[str], scheme: str) -> None:
    assert detect_scheme(sentence.split() for sentence in sentences) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "spans", "wrong"),
    [
        # what conlleval 1.2 says of these
        ("O I-A I-A", "iob2", [(1, 3, "A")], [1]),
        ("B-A I-B", "iob2", [(0, 1, "A"), (1, 2, "B")], [1]),
        ("I-A B-A I-A", "iob2", [(0, 1, "A"), (1, 3, "A")], [0]),
        ("B-A O E-A", "bioes", [(0, 1, "A"), (2, 3, "A")], [0, 2]),
        ("B-A I-A", "bioes", [(0, 2, "A")], [1]),
        ("S-A E-A", "bioes", [(0, 1, "A"), (1, 2, "A")], [1]),
        ("B-A B-A E-A", "bioes", [(0, 1, "A"), (1, 3, "A")], [0]),
        ("B-A E-B", "bioes", [(0, 1, "A"), (1, 2, "B")], [1]),
    ],
)
def test_forbidden_sequences_are_read_as_conlleval_does(
    tags: str, scheme: str, spans: list[tuple[int, int, str]], wrong: list[int]
) -> None:
    assert to_spans(tags.split(), scheme) == spans
    assert violations(tags.split(), scheme) == wrong


def test_random_sequences_are_read_as_seqeval_reads_them() -> None:
    """seqeval's default mode is conlleval's reading, for BIO and for the schemes with E and S."""
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    draw = random.Random(5)
    for scheme, letters in (("iob2", "BI"), ("iob1", "BI"), ("bioes", "BIES")):
        for _ in range(500):
            tags = [draw.choice(["O", *(f"{letter}-{kind}" for letter in letters for kind in "XY")]) for _ in range(8)]
            assert to_spans(tags, scheme) == [(start, end + 1, kind) for kind, start, end in get_entities(tags)]


def test_bare_types_make_runs_and_word_classes_stay() -> None:
    assert convert_tags(["PER", "PER", "O", "LOC"], "io") == ["B-PER", "I-PER", "O", "B-LOC"]
    assert convert_tags(["DT", "NN", "NN"], "words") == ["DT", "NN", "NN"]


def test_what_is_no_tag_or_no_scheme_is_named() -> None:
    with pytest.raises(DataError, match=r"tag 'X-A' of word 2 is not of the scheme iob2"):
        to_spans(["O", "X-A"], "iob2")
    with pytest.raises(DataError, match=r"tag scheme 'bioe'.*Did you mean 'bioes'"):
        to_spans(["O"], "bioe")
    with pytest.raises(DataError, match="overlaps another"):
        tags_of([(0, 2, "A"), (1, 3, "B")], 3)
    assert set(TAGS) < set(SCHEMES)


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in split_words(text)]


def test_words_of_latin_scripts_and_single_chinese_characters() -> None:
    assert words("Don't pay $3.50, Müller!") == ["Don", "'", "t", "pay", "$", "3", ".", "50", ",", "Müller", "!"]
    assert words("我爱NLP2024年\u3000。ok") == ["我", "爱", "NLP", "2024", "年", "。", "ok"]
    assert words("カタカナ と ひら") == ["カ", "タ", "カ", "ナ", "と", "ひ", "ら"]
    assert words("한국어 좋다") == ["한국어", "좋다"]  # Korean parts its words by spaces
    assert words("cafe\u0301 हिन्दी") == ["cafe\u0301", "हिन्दी"]  # marks belong to their letters
    assert words("  \n") == []


def test_joined_words_have_spaces_where_a_script_has_them() -> None:
    for given, text in ((["EU", "rejects"], "EU rejects"), (["我", "爱", "NLP", "很", "3", "4"], "我爱NLP很3 4")):
        joined, offsets = join_words(given)
        assert joined == text
        assert [joined[start:end] for start, end in offsets] == given


def test_parts_of_a_text_become_tags_and_back() -> None:
    text = "Ann lives in 北京市"
    offsets = split_words(text)
    parts = [(0, 3, "PER"), (13, 15, "LOC")]
    tags, widened, left_out = tags_of_parts(offsets, parts)
    assert tags == ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]
    assert (widened, left_out) == ([], [])
    assert parts_of_tags(offsets, tags) == parts


def test_parts_inside_words_are_widened_and_of_overlapping_ones_the_longest_stays() -> None:
    offsets = split_words("Annette and Bo")
    tags, widened, left_out = tags_of_parts(offsets, [(0, 3, "PER"), (0, 11, "GROUP"), (12, 14, "PER")])
    assert tags == ["B-GROUP", "I-GROUP", "B-PER"]
    assert (widened, left_out) == ([], [(0, 3, "PER")])
    tags, widened, _ = tags_of_parts(offsets, [(0, 3, "PER")])
    assert (tags, widened) == (["B-PER", "O", "O"], [(0, 3, "PER")])
