"""Metrics equal the field's own: scikit-learn, scipy and seqeval on random cases, official definitions by hand."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

import numpy as np
import pytest

from trainwright.base.errors import ConfigError
from trainwright.tasks.metrics.answers import (
    answer_scores,
    best_threshold,
    exact,
    f1,
    normalize,
    scorer_for,
)
from trainwright.tasks.metrics.chinese_answers import chinese_exact, chinese_f1, units
from trainwright.tasks.metrics.classes import confusion_matrix, matthews, several, single
from trainwright.tasks.metrics.correlation import number_scores, ranks
from trainwright.tasks.metrics.entities import SCHEMES, entities, entity_scores, strict_entities
from trainwright.tasks.metrics.relations import directed, relation_scores, undirected

# --- classes


@pytest.mark.parametrize("seed", range(8))
def test_single_labels_are_scored_as_scikit_learn_does(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 7))
    true = rng.integers(0, classes, 40).tolist()
    given = [t if rng.random() < 0.5 else int(rng.integers(0, max(1, classes - 1))) for t in true]
    metrics, table, confusion = single(true, given, [f"c{i}" for i in range(classes)])
    for kind in ("macro", "micro", "weighted"):
        expected = sklearn.precision_recall_fscore_support(true, given, average=kind, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert metrics[f"{name}_{kind}"] == pytest.approx(value, abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(true, given))
    assert metrics["matthews"] == pytest.approx(sklearn.matthews_corrcoef(true, given))
    assert confusion.tolist() == sklearn.confusion_matrix(true, given, labels=range(classes)).tolist()
    there = sorted({*true, *given})
    known = sklearn.classification_report(
        true, given, labels=there, target_names=[f"c{i}" for i in there], output_dict=True, zero_division=0
    )
    for row in table.rows:
        if row[0] == "accuracy":
            assert row[3] == pytest.approx(known["accuracy"])
            continue
        expected_row = known[row[0]]
        values = [expected_row[key] for key in ("precision", "recall", "f1-score", "support")]
        assert list(row[1:]) == pytest.approx(values)
    assert [row[0] for row in table.rows] == list(known)


@pytest.mark.parametrize("seed", range(4))
def test_several_labels_are_scored_as_scikit_learn_does(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    true, given = rng.integers(0, 2, (30, 5)), rng.integers(0, 2, (30, 5))
    given[:, 4] = 0  # a label that is never predicted
    metrics, _ = several(true, given, list("abcde"))
    for kind in ("macro", "micro", "weighted", "samples"):
        expected = sklearn.precision_recall_fscore_support(true, given, average=kind, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert metrics[f"{name}_{kind}"] == pytest.approx(value, abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(true, given))
    assert metrics["hamming_loss"] == pytest.approx(sklearn.hamming_loss(true, given))


def test_classes_by_hand() -> None:
    metrics, table, confusion = single([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], ["a", "b", "never"])
    assert confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["f1_macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)  # "never" does not count
    assert [row[0] for row in table.rows] == ["a", "b", "accuracy", "macro avg", "weighted avg"]
    assert matthews(confusion_matrix([0, 1], [0, 1], 2)) == 1.0
    assert matthews(confusion_matrix([0, 1], [0, 0], 2)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_scored_as_scipy_and_scikit_learn_do(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    true, given = rng.integers(0, 6, 50).astype(float), rng.normal(size=50).round(1)
    found = number_scores(true, given)
    assert found["pearson"] == pytest.approx(stats.pearsonr(true, given).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, given).statistic)
    assert found["mse"] == pytest.approx(sklearn.mean_squared_error(true, given))
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(true, given))
    assert found["r2"] == pytest.approx(sklearn.r2_score(true, given))
    assert number_scores([1.0, 2.0], [3.0, 3.0])["pearson"] == 0.0


@pytest.mark.parametrize("value", [0.1, 0.3, 2.7, -3.3, 1e8 + 0.1])
@pytest.mark.parametrize("count", [1, 3, 7, 49])
def test_equal_numbers_correlate_with_nothing(value: float, count: int) -> None:
    """The mean of equal numbers is rounded: what is left without it must not be taken for a spread."""
    same, others = np.full(count, value), np.arange(count) ** 2 + 0.5
    for true, given in ((same, others), (others, same)):
        found = number_scores(true, given)
        assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert number_scores(same, others)["r2"] == 0.0
    assert number_scores(same, same)["r2"] == 1.0, "as scikit-learn has it"


def test_ranks_of_equal_numbers_are_shared() -> None:
    assert ranks([10, 20, 10, 30]).tolist() == [1.5, 3.0, 1.5, 4.0]


# --- entities

LETTERS = {"IOB1": "IB", "IOB2": "IB", "IOBES": "IBES", "BILOU": "IBLU"}


def random_tags(rng: random.Random, scheme: str) -> list[str]:
    """Any sequence of the letters of a scheme: mostly broken ones."""
    length = rng.randint(1, 9)
    return [
        "O" if rng.random() < 0.3 else f"{rng.choice(LETTERS[scheme])}-{rng.choice(['PER', 'LOC', 'A-B'])}"
        for _ in range(length)
    ]


def seqeval_entities(tags: Sequence[str], scheme: str | None) -> list[tuple[str, int, int]]:
    metrics = pytest.importorskip("seqeval.metrics.sequence_labeling")
    if scheme is None:
        found: list[tuple[str, int, int]] = metrics.get_entities(list(tags))
        return found
    module = pytest.importorskip("seqeval.scheme")
    tokens = module.Tokens(list(tags), scheme=getattr(module, scheme))
    return [(entity.tag, entity.start, entity.end - 1) for entity in tokens.entities]


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_entities_of_any_sequence_are_seqevals(scheme: str) -> None:
    rng = random.Random(scheme)
    for _ in range(1500):
        tags = random_tags(rng, scheme)
        assert entities(tags) == seqeval_entities(tags, None), tags


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_strict_entities_of_any_sequence_are_seqevals(scheme: str) -> None:
    rng = random.Random(scheme)
    for _ in range(1500):
        tags = random_tags(rng, scheme)
        assert strict_entities(tags, scheme) == seqeval_entities(tags, scheme), tags


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_scores_of_entities_are_seqevals(scheme: str, strict: bool) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    module = pytest.importorskip("seqeval.scheme")
    rng = random.Random(7)
    for _ in range(20):
        true = [random_tags(rng, scheme) for _ in range(12)]
        given = [[tag if rng.random() < 0.7 else rng.choice(tags) for tag in tags] for tags in true]
        found, table = entity_scores(true, given, scheme if strict else None)
        how = {"mode": "strict", "scheme": getattr(module, scheme)} if strict else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = metrics.classification_report(true, given, output_dict=True, zero_division=0, **how)
        for row in table.rows:
            values = [report[row[0]][key] for key in ("precision", "recall", "f1-score", "support")]
            assert list(row[1:]) == pytest.approx(values)
        assert [row[0] for row in table.rows] == list(report)
        micro = report["micro avg"]
        assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(
            (micro["precision"], micro["recall"], micro["f1-score"])
        )
        assert found["token_accuracy"] == pytest.approx(metrics.accuracy_score(true, given))


def test_entities_by_hand() -> None:
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "I-ORG"]) == [("PER", 0, 1), ("LOC", 3, 3), ("ORG", 4, 4)]
    assert strict_entities(["B-PER", "I-PER", "O", "I-LOC", "I-ORG"], "IOB2") == [("PER", 0, 1)]
    assert strict_entities(["S-A", "B-A", "I-A", "E-A", "B-A", "O"], "IOBES") == [("A", 0, 0), ("A", 1, 3)]
    metrics, _ = entity_scores([["B-A", "I-A", "O", "B-B"]], [["B-A", "O", "O", "B-B"]])
    assert metrics["f1"] == 0.5
    assert metrics["token_accuracy"] == 0.75
    assert metrics["f1_macro"] == 0.5
    with pytest.raises(ConfigError, match="'E-A' is not one of IOB2"):
        strict_entities(["E-A"], "IOB2")


# --- relations

SEMEVAL = ["Cause-Effect", "Component-Whole", "Other"]


def test_the_official_score_of_relations_by_hand() -> None:
    """(gold, predicted), counted by hand in the official scorer's way."""
    pairs = [
        ("Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)"),  # right
        ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)"),  # wrong direction: wrong for recall and precision
        ("Cause-Effect(e2,e1)", "Cause-Effect(e2,e1)"),  # right, the other direction: the same row
        ("Cause-Effect(e2,e1)", "Other"),  # missed
        ("Component-Whole(e1,e2)", "Component-Whole(e1,e2)"),
        ("Component-Whole(e1,e2)", "Cause-Effect(e1,e2)"),
        ("Other", "Component-Whole(e2,e1)"),  # invented
        ("Other", "Other"),  # does not count
    ]
    metrics, table = relation_scores(*zip(*pairs, strict=True), other="Other")
    cause = (2 / 4, 2 / 4)  # 2 right of 4 predicted (one of them Component-Whole), of 4 true
    whole = (1 / 2, 1 / 2)
    assert table.rows[0][:3] == ("Cause-Effect", *cause)
    assert table.rows[1][:3] == ("Component-Whole", *whole)
    assert metrics["f1_macro"] == pytest.approx((0.5 + 0.5) / 2)
    assert metrics["precision_micro"] == pytest.approx(3 / 6)
    assert metrics["recall_micro"] == pytest.approx(3 / 6)
    assert metrics["accuracy"] == pytest.approx(4 / 8)


def test_the_official_score_is_a_mean_of_f1s_not_the_f1_of_means() -> None:
    pairs = [("A(e1,e2)", "A(e1,e2)"), ("B(e1,e2)", "Other"), ("B(e2,e1)", "B(e2,e1)"), ("B(e1,e2)", "A(e2,e1)")]
    metrics, table = relation_scores(*zip(*pairs, strict=True), other="Other")
    of_a, of_b = 2 * 0.5 * 1 / 1.5, 2 * 1 * (1 / 3) / (4 / 3)
    assert metrics["f1_macro"] == pytest.approx((of_a + of_b) / 2)
    assert [row[4] for row in table.rows] == [1, 3, 4, 4]


def test_relations_that_are_true_nowhere_are_in_no_row() -> None:
    metrics, table = relation_scores(["A", "none"], ["A", "B"], other="none")
    assert [row[0] for row in table.rows] == ["A", "micro avg", "macro avg"]
    assert metrics["f1_macro"] == 1.0
    assert metrics["precision_micro"] == 0.5  # the invented B counts there
    assert relation_scores(["A", "B"], ["A", "A"], other=None)[0]["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_directions() -> None:
    assert undirected("Cause-Effect(e2,e1)") == "Cause-Effect"
    assert undirected("per:title") == "per:title"
    assert directed(["Other", "A(e1,e2)"])
    assert not directed(["per:title"])


def test_the_published_row_of_an_official_table() -> None:
    """206 right, 249 predicted, none in the wrong direction, 232 true: P 82.73 %, R 88.79 %, F1 85.65 %."""
    name = "Member-Collection(e1,e2)"
    true = [name] * 206 + [name] * 26 + ["Other"] * 43
    given = [name] * 206 + ["Other"] * 26 + [name] * 43
    row = relation_scores(true, given, other="Other")[1].rows[0]
    assert [round(100 * value, 2) for value in row[1:4]] == [82.73, 88.79, 85.65]


# --- answers


def test_normalized_answers() -> None:
    assert normalize("The  Quick, brown-fox's a  den!") == "quick brownfoxs den"
    assert normalize("an the a") == ""
    assert exact("The Normans", "normans.") == 1.0
    assert exact("Normans", "the Norman") == 0.0


def test_f1_of_answers_by_hand() -> None:
    assert f1("in the 10th century", "10th century") == pytest.approx(2 * 2 / (3 + 2))
    assert f1("a b b c", "b b b") == pytest.approx(2 * 2 / (3 + 3))  # "a" is an article; b counts twice
    assert f1("", "") == 1.0
    assert f1("", "word") == 0.0
    assert f1("word", "the") == 0.0


def test_squad_2_by_hand() -> None:
    gold = {"1": ["France", "in France"], "2": [], "3": [], "4": ["10th and 11th centuries"], "5": ["the"]}
    given = {"1": "In France!", "2": "", "3": "Rollo", "4": "11th centuries"}
    metrics, each = answer_scores(gold, given)
    assert each["1"] == (1.0, 1.0)
    assert each["2"] == (1.0, 1.0)
    assert each["3"] == (0.0, 0.0)
    assert each["4"] == (0.0, pytest.approx(2 * 2 / (4 + 2)))
    assert each["5"] == (0.0, 0.0)  # not answered at all
    assert metrics["exact"] == pytest.approx(2 / 5)
    assert metrics["f1"] == pytest.approx((2 + 2 / 3) / 5)
    assert metrics["has_answer_exact"] == pytest.approx(1 / 3)
    assert metrics["has_answer_f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert metrics["no_answer_exact"] == metrics["no_answer_f1"] == 0.5
    only = answer_scores({"1": ["x"]}, {"1": "x"})[0]
    assert set(only) == {"exact", "f1"}


def test_the_best_threshold_is_found_as_squad_2_does() -> None:
    scores = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.8}
    null = {"a": -3.0, "b": 1.0, "c": -1.0, "d": 2.0}
    has = {"a": True, "b": True, "c": False, "d": True}
    # in order of null scores: a +1 = 2, c (unanswerable, answered) -1 = 1, b +0.5, d +0.8 = 2.3
    assert best_threshold(scores, null, has) == (pytest.approx(2.3 / 4), 2.0)
    assert best_threshold(scores, null, {**has, "b": False, "d": False}) == (pytest.approx(4 / 4), -3.0)
    worst, threshold = best_threshold({"a": 0.0}, {"a": 1.0}, {"a": False})
    assert (worst, threshold < 1.0) == (1.0, True)


def test_units_of_chinese_answers() -> None:
    assert units("《战国无双3》是2008年的Game Boy。") == [*"战国无双", "3", "是", "2008", "年", "的", "game", "boy"]
    assert units("3.5米") == ["3.5", "米"]


def test_chinese_answers_by_hand() -> None:
    assert chinese_exact("光荣和ω-force", "光荣和Ωforce。") == 1.0
    assert chinese_exact("光荣", "光荣的") == 0.0
    # longest shared run, not the bag of characters: 光荣 of 光荣和任天堂 and 任天堂光荣
    assert chinese_f1("光荣和任天堂", "任天堂光荣") == pytest.approx(2 * 3 / (6 + 5))
    assert chinese_f1("村雨城", "战国") == 0.0
    metrics, each = answer_scores({"1": ["1978年", "一九七八年"]}, {"1": "在1978年"}, scorer_for(["1978年"]))
    assert each["1"] == (0.0, pytest.approx(2 * 2 / (2 + 3)))
    assert metrics["f1"] == each["1"][1]


def test_which_definition_counts() -> None:
    assert scorer_for(["France", "10th"]).name == "SQuAD"
    assert scorer_for(["战国", "1978", "光荣"]).name == "CMRC 2018"
    assert scorer_for(["战国"], "squad").name == "SQuAD"
