"""Metrics of texts are those of the packages that papers use, Chinese included, and stand beside baselines."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

from trainwright.base.errors import MissingDependencyError
from trainwright.tasks.text_metrics import (
    Written,
    choose_words,
    copied,
    first_sentence,
    is_chinese,
    overlap,
    require_packages,
    split_words,
    text_report,
)
from trainwright.tasks.text_metrics.retrieval import retrieval_scores

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

ENGLISH = ["The cat sat on the mat.", "Two young men are outside near many bushes."]
WRITTEN_ENGLISH = ["The cat is on the mat.", "Two men are outside."]
CHINESE = ["今天北京天气很好。", "一种飞行器的姿态控制方法"]
WRITTEN_CHINESE = ["今天天气很好。", "飞行器姿态控制方法研究"]


def test_equal_texts_have_full_scores_and_foreign_ones_none() -> None:
    for texts in (ENGLISH, CHINESE):
        words = choose_words("auto", texts)
        best = overlap(texts, texts, words)
        assert all(abs(value - 100) < 1e-9 for value in best.metrics().values())
        worst = overlap(["zzz", "qqq"], texts, words)
        assert worst.rouge1 == worst.rougeL == 0
        assert worst.bleu < 5


def test_scores_are_those_of_the_packages() -> None:
    found = overlap(WRITTEN_ENGLISH, ENGLISH, "13a")
    assert found.bleu == sacrebleu.corpus_bleu(WRITTEN_ENGLISH, [ENGLISH]).score
    assert found.chrf == sacrebleu.corpus_chrf(WRITTEN_ENGLISH, [ENGLISH]).score
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])  # its own tokenizer
    for kind in ("rouge1", "rouge2", "rougeL"):
        pairs = zip(ENGLISH, WRITTEN_ENGLISH, strict=True)
        expected = np.mean([scorer.score(reference, text)[kind].fmeasure for reference, text in pairs])
        assert abs(getattr(found, kind) - 100 * expected) < 1e-9
    assert any("tok:13a" in note for note in found.notes)


def test_chinese_is_scored_by_characters() -> None:
    found = overlap(WRITTEN_CHINESE, CHINESE, "zh")
    assert found.bleu == sacrebleu.corpus_bleu(WRITTEN_CHINESE, [CHINESE], tokenize="zh").score
    # by hand: 今天天气很好 against 今天北京天气很好: 6 characters of 6 and of 8; all 6 in order
    first = overlap(WRITTEN_CHINESE[:1], CHINESE[:1], "zh")
    assert abs(first.rouge1 - 100 * 2 * (6 / 6) * (6 / 8) / (6 / 6 + 6 / 8)) < 1e-9
    assert abs(first.rougeL - first.rouge1) < 1e-9
    assert abs(first.rouge2 - 100 * 2 * (4 / 5) * (4 / 7) / (4 / 5 + 4 / 7)) < 1e-9


def test_several_references() -> None:
    """Whatever one of them says is right; texts may have different numbers of them."""
    references = [["The cat sat.", "A cat is on the mat."], ["Two men."]]
    found = overlap(["A cat is on the mat.", "Two men."], references, "13a")
    assert all(abs(value - 100) < 1e-9 for value in found.metrics().values())
    one = overlap(["A cat is on the mat.", "Two men."], [several[0] for several in references], "13a")
    assert one.bleu < 60
    assert one.rougeL < 80
    answer = Written("source", "The cat sat.", "A cat is on the mat.", True, 6, ("A cat is on the mat.",))
    assert text_report([answer]).metrics["exact_match"] == 1.0
    assert text_report([answer]).errors == ()


def test_umlauts_belong_to_words() -> None:
    """rouge-score's own tokenizer would cut Männer into m and nner."""
    assert overlap(["Männer"], ["Manner"], "13a").rouge1 == 0
    assert overlap(["Männer"], ["Männer"], "13a").rouge1 == 100
    assert split_words("Zwei Männer, 2x!", "any") == ["zwei", "männer", "2x"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (ENGLISH, False),
        (CHINESE, True),
        (["使用 PyTorch 训练模型 model"], True),
        (["日本語のテキストです。これは中国語ではありません"], False),
        (["한국어 텍스트 中"], False),
        ([""], False),
        (["12345"], False),
    ],
)
def test_chinese_is_recognised(texts: list[str], expected: bool) -> None:
    assert is_chinese(texts) is expected
    assert choose_words("auto", texts) == ("zh" if expected else "13a")
    assert choose_words("char", texts) == "char"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("One. Two.", "One."),
        ("Costs 3.5 dollars. Cheap!", "Costs 3.5 dollars."),
        ('He said "no!" Then left.', 'He said "no!"'),
        ("The U.S. won. It did.", "The U.S."),
        ("今天天气好。明天下雨。", "今天天气好。"),
        ("战国无双3！由光荣开发。", "战国无双3！"),
        ("“真的吗？”他问。", "“真的吗？”"),
        ("#Person1#: Hi\n#Person2#: Hello.", "#Person1#: Hi"),
        ("no mark at all", "no mark at all"),
        ("", ""),
    ],
)
def test_first_sentence(source: str, sentence: str) -> None:
    assert first_sentence(source) == sentence
    assert copied(f" {source} ") == source


def test_report_sets_the_model_beside_the_baselines() -> None:
    answers = [
        Written("A. B.", "A.", "A.", True, 2),
        Written("今天好。明天坏。", "好。", "坏", False, 1),
    ]
    report = text_report(answers)
    assert report.metrics["exact_match"] == 0.5
    assert report.metrics["eos_rate"] == 0.5
    assert report.metrics["mean_tokens"] == 1.5
    assert set(report.metrics) >= {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "length_ratio"}
    (table,) = report.tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert set(rows) == {"model", "lead-1 (first sentence)", "copy of the source"}
    assert rows["lead-1 (first sentence)"]["exact_match"] == 0.5
    assert rows["copy of the source"]["exact_match"] == 0
    assert rows["copy of the source"]["length_ratio"] == 13 / 4
    assert [error["expected"] for error in report.errors] == ["好。"]
    plain = text_report(answers, with_overlap=False)
    assert "bleu" not in plain.metrics
    with pytest.raises(ValueError, match="at least one"):
        text_report([])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else known(name))
    with pytest.raises(MissingDependencyError, match=r"need rouge-score(.|\n)*trainwright\[metrics\]"):
        require_packages()


# ---- retrieval


def test_retrieval_by_hand() -> None:
    """Three documents on the axes; queries rank them 1st, 2nd and 3rd."""
    documents = np.eye(3)
    queries = np.array([[0.9, 0.4, 0.1], [0.9, 0.4, 0.1], [0.9, 0.4, 0.1]])
    scores, first = retrieval_scores(queries, documents, [{0}, {1}, {2}])
    assert scores["recall@1"] == pytest.approx(1 / 3)
    assert scores["recall@5"] == 1
    assert scores["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert first[:, 0].tolist() == [0, 0, 0]


def test_several_relevant_documents() -> None:
    scores, _ = retrieval_scores(np.array([[1.0, 0.5, 0.2]]), np.eye(3), [{0, 2}])
    assert scores["recall@1"] == 1
    assert scores["recall@5"] == 1
    ideal = 1 + 1 / math.log2(3)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / ideal)


def test_retrieval_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(40, 8)), generator.normal(size=(60, 8))
    relevant = [set(generator.choice(60, size=3, replace=False).tolist()) for _ in range(40)]
    gains = np.array([[float(d in relevant[q]) for d in range(60)] for q in range(40)])
    scores, _ = retrieval_scores(queries, documents, relevant)
    assert scores["ndcg@10"] == pytest.approx(metrics.ndcg_score(gains, queries @ documents.T, k=10))
