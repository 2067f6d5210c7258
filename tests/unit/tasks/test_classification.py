"""Classification: labels, rows, losses against torch's own, predictions and reports."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_models import TinyModel, collate, encode_all, placed, predictions, train, word_tokenizer
from torch.nn import functional as F

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks import ClassificationSection
from trainwright.data.examples.example import IGNORE
from trainwright.tasks.classification import Classification, ClassificationDefinition
from trainwright.tasks.labelled_classes import ClassObjective
from trainwright.tasks.labelled_loss import binary_losses, class_distance, class_losses, twice

WORDS = ["good", "bad", "film", "food", "very", "not", "a", "the", "好", "坏", "电影"]
TOKENIZER = word_tokenizer(WORDS)


def bind(
    records: list[dict[str, Any]], *, tokenizer: Any = TOKENIZER, max_length: int = 16, **options: Any
) -> Classification:
    definition = ClassificationDefinition(ClassificationSection(name="classification", **options), max_length)
    return definition.bind(definition.survey(iter(records)), tokenizer)


def survey(records: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return ClassificationDefinition(ClassificationSection(name="classification", **options), 16).survey(iter(records))


REVIEWS = [
    {"text": "good film", "label": "pos"},
    {"text": "very good food", "label": "pos"},
    {"text": "bad film", "label": "neg"},
    {"text": "the bad food", "label": "neg"},
    {"text": "电影 好", "label": "pos"},
    {"text": "电影 坏", "label": "neg"},
]


# --- what a label is


def test_labels_are_counted_and_sorted_as_people_count() -> None:
    found = survey([{"text": "a", "label": label} for label in (10, 2, "b", "a10", "a9", 2)])
    assert found["problem"] == "single_label"
    assert found["counts"] == {"10": 1, "2": 2, "b": 1, "a10": 1, "a9": 1}
    task = bind([{"text": "a", "label": label} for label in (10, 2, "b", "a10", "a9")])
    assert task.labels.names == ("2", "10", "a9", "a10", "b")


@pytest.mark.parametrize(
    ("label", "problem"),
    [("x", "single_label"), (3, "single_label"), (True, "single_label"), (["x"], "multi_label"), (0.5, "regression")],
)
def test_what_a_label_is_is_read_off_the_data(label: Any, problem: str) -> None:
    assert survey([{"text": "a", "label": label}])["problem"] == problem


def test_labels_of_two_kinds_are_refused_with_their_places() -> None:
    records = [{"text": "a", "label": "x", "where": "t.csv:2"}, {"text": "a", "label": 0.5, "where": "t.csv:3"}]
    with pytest.raises(DataError, match=r"names \(t.csv:2\) and numbers \(t.csv:3\)"):
        survey(records)


def test_no_label_anywhere_is_refused() -> None:
    with pytest.raises(DataError, match="no training record has a label"):
        survey([{"text": "a"}])


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"t.csv:9: label is 'high'; expected a number"):
        survey([{"text": "a", "label": "high", "where": "t.csv:9"}], problem="regression")


def test_a_label_that_training_has_not_is_refused_with_what_there_is() -> None:
    task = bind(REVIEWS)
    with pytest.raises(
        DataError, match=r"'poss' is none of the 2 .* neg \(3\), pos \(3\).*Did you mean 'pos'"
    ) as caught:
        task.encoder.encode({"text": "a", "label": "poss"})
    assert "task.unseen_as" in str(caught.value)
    mapped = bind(REVIEWS, unseen_as="neg")
    assert int(mapped.encoder.encode({"text": "a", "label": "poss"}).examples[0].arrays["labels"]) == 0
    with pytest.raises(ConfigError, match="unseen_as is 'nge'"):
        bind(REVIEWS, unseen_as="nge")


def test_listed_labels_keep_their_order_and_refuse_others() -> None:
    assert bind(REVIEWS, labels=["pos", "neg", "mixed"]).labels.names == ("pos", "neg", "mixed")
    with pytest.raises(DataError, match=r"3 training records have a label that task.labels does not list: neg \(3\)"):
        bind(REVIEWS, labels=["pos"])


# --- rows


def test_rows_are_those_of_the_tokenizers_own_template() -> None:
    pairs = [{"text": "good film", "text2": "bad", "label": "x"}, {"text": "not good", "label": "y"}]
    encoder = bind(pairs).encoder
    for record in pairs:
        arrays = encoder.encode(record).examples[0].arrays
        texts = [record["text"], *([record["text2"]] if "text2" in record else [])]
        expected = TOKENIZER.core.encode(*texts, add_special_tokens=True)
        assert arrays["input_ids"].tolist() == expected.ids
        assert arrays["token_type_ids"].tolist() == expected.type_ids


def test_single_texts_have_no_token_types_and_decoders_no_frame() -> None:
    assert [feature.name for feature in bind(REVIEWS).encoder.features] == ["input_ids", "labels"]
    plain = word_tokenizer(WORDS, framed=False)
    task = bind([{"text": "good", "text2": "bad", "label": "x"}], tokenizer=plain, frame="decoder")
    ids = task.encoder.encode({"text": "good", "text2": "bad"}).examples[0].arrays["input_ids"].tolist()
    assert ids == [*plain.encode("good"), plain.eos_id, *plain.encode("bad")]  # this tokenizer has no line feed


def test_special_tokens_in_a_text_are_plain_text() -> None:
    encoder = bind(REVIEWS).encoder
    ids = encoder.encode({"text": "good [SEP] bad"}).examples[0].arrays["input_ids"].tolist()
    assert ids.count(TOKENIZER.special_id("sep")) == 1
    assert ids[-1] == TOKENIZER.special_id("sep")


@pytest.mark.parametrize(("cut", "kept"), [("end", "0123"), ("start", "6789"), ("middle", "0189")])
def test_the_cut_part_is_counted_and_the_frame_stays(cut: str, kept: str) -> None:
    tokenizer = word_tokenizer(list("0123456789"))
    task = bind([{"text": "1", "label": "x"}], tokenizer=tokenizer, max_length=6, cut=cut)
    encoded = task.encoder.encode({"text": " ".join("0123456789")})
    ids = encoded.examples[0].arrays["input_ids"].tolist()
    assert "".join(tokenizer.token(i) or "" for i in ids[1:-1]) == kept
    assert (ids[0], ids[-1]) == (tokenizer.special_id("cls"), tokenizer.special_id("sep"))
    assert encoded.cut_tokens == 6


def test_the_longer_text_of_a_pair_gives_first() -> None:
    tokenizer = word_tokenizer(list("0123456789"))
    task = bind([{"text": "1", "text2": "1", "label": "x"}], tokenizer=tokenizer, max_length=9)
    row = task.encoder.encode({"text": "1 2", "text2": "3 4 5 6 7 8"})
    assert tokenizer.decode(row.examples[0].arrays["input_ids"]).split() == ["1", "2", "3", "4", "5", "6"]
    assert row.cut_tokens == 2
    both = task.encoder.encode({"text": "1 2 3 4 5", "text2": "6 7 8 9 0"})
    assert tokenizer.decode(both.examples[0].arrays["input_ids"]).split() == ["1", "2", "3", "6", "7", "8"]


def test_an_empty_text_is_dropped_where_nothing_frames_it() -> None:
    plain = word_tokenizer(WORDS, framed=False)
    assert bind(REVIEWS, tokenizer=plain, frame="decoder").encoder.encode({"text": ""}).dropped == "the text is empty"
    assert bind(REVIEWS).encoder.encode({"text": ""}).examples[0].length == 2


def test_rows_that_hold_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 tokens stand around a pair"):
        bind(REVIEWS, max_length=4)


def test_the_encoder_crosses_processes_and_says_what_it_does() -> None:
    task = bind(REVIEWS)
    copy = pickle.loads(pickle.dumps(task.encoder))
    for record in REVIEWS:
        first, second = (e.encode(record).examples[0].arrays for e in (task.encoder, copy))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert copy.fingerprint == task.encoder.fingerprint
    others = [
        bind(REVIEWS, max_length=12),
        bind(REVIEWS, cut="start"),
        bind(REVIEWS, labels=["pos", "neg"]),
        bind(REVIEWS, unseen_as="pos"),
        bind(REVIEWS, frame="decoder"),
        bind([{**REVIEWS[0], "text2": "a"}, REVIEWS[2]]),
    ]
    assert len({task.encoder.fingerprint, *(other.encoder.fingerprint for other in others)}) == 7
    same = bind(REVIEWS, focal_gamma=2.0, r_drop=1.0, class_weights="auto", head_dropout=0.3)
    assert same.encoder.fingerprint == task.encoder.fingerprint  # the loss does not change the rows


# --- losses


def scores_and_labels(rows: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, classes, dtype=torch.float64, requires_grad=True), torch.randint(0, classes, (rows,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    scores, labels = scores_and_labels()
    mine = class_losses(scores, labels, smoothing=smoothing)
    assert mine.dtype == torch.float32
    expected = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(mine, expected.float(), atol=1e-6)


def test_weights_are_those_of_the_true_label() -> None:
    scores, labels = scores_and_labels()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    expected = F.cross_entropy(scores.float(), labels, weight=weights, reduction="none")
    assert torch.allclose(class_losses(scores, labels, weights=weights), expected, atol=1e-6)


def test_focal_loss_is_the_papers_and_its_gradient_is_finite_for_sure_predictions() -> None:
    scores, labels = scores_and_labels()
    shares = scores.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    expected = -((1 - shares) ** 2) * shares.log()
    assert torch.allclose(class_losses(scores, labels, gamma=2.0), expected.float(), atol=1e-6)
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    class_losses(sure, torch.tensor([0]), gamma=0.5).sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_rows_without_a_label_add_nothing() -> None:
    scores, labels = scores_and_labels()
    some = labels.clone()
    some[::3] = IGNORE
    losses = class_losses(scores, some, gamma=1.0, smoothing=0.1)
    assert (losses[::3] == 0).all()
    assert torch.equal(losses[1], class_losses(scores, labels, gamma=1.0, smoothing=0.1)[1])
    hot = torch.full((3, 2), float("nan"))
    hot[0] = torch.tensor([1.0, 0.0])
    alone = binary_losses(scores[:3, :2].detach(), hot)
    expected = F.binary_cross_entropy_with_logits(scores[0, :2].detach().float(), hot[0])
    assert alone.tolist() == pytest.approx([float(expected), 0.0, 0.0])


def test_distance_of_two_dropouts_is_the_mean_of_both_divergences() -> None:
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    both = F.kl_div(q, p, reduction="none", log_target=True) + F.kl_div(p, q, reduction="none", log_target=True)
    assert torch.allclose(class_distance(a, b), both.sum(-1) / 2, atol=1e-6)


def test_r_drop_is_one_pass_over_rows_twice() -> None:
    task = bind(REVIEWS, r_drop=0.7)
    examples, _, _ = encode_all(task.encoder, REVIEWS)
    batch = collate(task.encoder.features, examples)
    model = TinyModel(task.head, TOKENIZER.vocab_size, dropout=0.3)
    torch.manual_seed(5)
    output = task.loss(model, batch)
    torch.manual_seed(5)
    first, second = model.scores({k: torch.cat((v, v)) for k, v in batch.items()}).chunk(2)
    by_hand = 0.5 * (
        F.cross_entropy(first, batch["labels"], reduction="sum")
        + F.cross_entropy(second, batch["labels"], reduction="sum")
    )
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    apart = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum()
    assert apart > 1e-3
    assert float(output.loss_sum.detach()) == pytest.approx(float((by_hand + 0.7 * apart).detach()), rel=1e-5)
    assert int(output.count) == len(REVIEWS)
    without = TinyModel(task.head, TOKENIZER.vocab_size)
    plain = bind(REVIEWS).loss(without, batch)
    assert float(task.loss(without, batch).loss_sum.detach()) == pytest.approx(float(plain.loss_sum.detach()), rel=1e-5)


def test_the_second_dropout_of_a_row_has_a_number_of_its_own() -> None:
    told: list[Any] = []

    class Told:
        dropout_place = placed(11, torch.tensor([3, 4]))

        def set_dropout(self, *, seed: int, rows: torch.Tensor) -> None:
            told.append((seed, rows.tolist()))

    doubled = twice(Told(), {"input_ids": torch.tensor([[1], [2]])})
    assert doubled["input_ids"].flatten().tolist() == [1, 2, 1, 2]
    (seed, rows) = told[0]
    assert seed == 11
    assert rows[:2] == [3, 4]
    assert len(set(rows)) == 4


def test_models_of_transformers_draw_everything_from_torchs_generator(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from trainwright.models.attach import attach_head
    from trainwright.models.embedding_noise import attach_embedding_noise
    from trainwright.models.importing import load_pretrained

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ElectraConfig(vocab_size=TOKENIZER.vocab_size, embedding_size=16, **sizes)
    transformers.ElectraForMaskedLM(config).save_pretrained(tmp_path)
    task = bind(REVIEWS, r_drop=0.7)
    model: Any = attach_head(load_pretrained(tmp_path), task.head)  # type: ignore[arg-type]
    attach_embedding_noise(model.train(), 5.0)
    examples, _, _ = encode_all(task.encoder, REVIEWS)
    model.set_dropout(seed=3, rows=torch.arange(6))
    output = task.loss(model, collate(task.encoder.features, examples))
    assert torch.isfinite(output.loss_sum)


@pytest.mark.parametrize("noise", [None, 5.0])
def test_r_drop_of_a_real_model_does_not_depend_on_how_rows_are_dealt(noise: float | None) -> None:
    """Dropout, and noise on embeddings, go by the numbers of rows: two micro-batches draw what one batch draws."""
    from trainwright.models import build_model
    from trainwright.models.attach import attach_head
    from trainwright.models.embedding_noise import attach_embedding_noise
    from trainwright.models.fields import config_from_fields

    task = bind(REVIEWS, r_drop=0.7)
    assert task.head is not None
    sizes = {"vocab_size": TOKENIZER.vocab_size, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    fields = {"family": "bert", "num_heads": 2, "max_position_embeddings": 16, **sizes}
    model: Any = attach_head(build_model(config_from_fields(fields)), task.head).train()
    listener = None if noise is None else attach_embedding_noise(model, noise)
    examples, _, _ = encode_all(task.encoder, REVIEWS)
    batch = collate(task.encoder.features, examples)
    if listener is not None:
        listener.see(batch)

    def sums(first: int, last: int) -> float:
        model.set_dropout(seed=3, rows=torch.arange(first, last))
        return float(task.loss(model, {name: value[first:last] for name, value in batch.items()}).loss_sum.detach())

    whole = sums(0, 6)
    assert sums(0, 2) + sums(2, 6) == pytest.approx(whole, rel=1e-5)
    plain = bind(REVIEWS)
    model.set_dropout(seed=3, rows=torch.arange(6))
    assert float(plain.loss(model, batch).loss_sum.detach()) != pytest.approx(whole, rel=1e-4)


def test_r_drop_is_refused_where_rows_come_once() -> None:
    task = bind(REVIEWS, r_drop=0.7)
    examples, _, _ = encode_all(task.encoder, REVIEWS)

    class Part:
        dropout_place = placed(1, None)  # type: ignore[arg-type]

        def scores(self, batch: Any) -> torch.Tensor:
            return torch.zeros(len(REVIEWS), 2)

    with pytest.raises(ConfigError, match="reads rows twice"):
        task.loss(Part(), collate(task.encoder.features, examples))


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_sums_over_micro_batches_are_those_of_the_batch(problem: Any) -> None:
    torch.manual_seed(0)
    scores = torch.randn(8, 3)
    labels = {
        "single_label": torch.tensor([0, 1, 2, IGNORE, 1, 0, IGNORE, 2]),
        "multi_label": torch.randint(0, 2, (8, 3)).float(),
        "regression": torch.randn(8),
    }[problem]
    if problem != "single_label":
        labels[3] = float("nan")
    objective = ClassObjective(problem, (0.5, 1.0, 2.0) if problem != "regression" else None, r_drop=0.0)
    batch = {"scores": scores if problem != "regression" else scores[:, :1], "labels": labels}
    batch["input_ids"] = torch.zeros(8, 1, dtype=torch.int64)

    class Given:
        def scores(self, batch: Any) -> torch.Tensor:
            return batch["scores"]

        def auxiliary_loss(self, labels: torch.Tensor) -> None:
            return None

    whole = objective.loss(Given(), batch)
    parts = [objective.loss(Given(), {k: v[i : i + 3] for k, v in batch.items()}) for i in range(0, 8, 3)]
    assert float(sum(part.loss_sum for part in parts)) == pytest.approx(float(whole.loss_sum), rel=1e-6)
    assert sum(int(part.count) for part in parts) == int(whole.count) == (6 if problem == "single_label" else 7)


def test_weights_have_the_mean_one_over_the_training_texts() -> None:
    records = [{"text": "a", "label": "x"}] * 9 + [{"text": "a", "label": "y"}] * 3
    assert bind(records, class_weights="auto").objective.weights == pytest.approx((12 / 18, 12 / 6))
    given = bind(records, class_weights={"y": 5.0}).objective.weights
    assert given is not None
    assert (9 * given[0] + 3 * given[1]) / 12 == pytest.approx(1.0)
    assert given[1] / given[0] == pytest.approx(5.0)
    assert bind(records).objective.weights is None
    with pytest.raises(ConfigError, match="class_weights has 'z'"):
        bind(records, class_weights={"z": 1.0})
    several = [{"text": "a", "label": ["x"]}] * 3 + [{"text": "a", "label": ["x", "y"]}]
    assert bind(several, class_weights="auto").objective.weights == pytest.approx((1 / 4, 3.0))


# --- learning, predictions, reports


def test_a_model_learns_predicts_and_is_reported_on() -> None:
    task = bind(REVIEWS)
    assert task.head is not None
    assert (task.head.kind, task.head.labels) == ("sequence", ("neg", "pos"))
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    assert train(task, model, REVIEWS, steps=60) < 0.05
    given = predictions(task, model, [{"text": record["text"], "id": str(n)} for n, record in enumerate(REVIEWS)])
    assert [prediction["label"] for prediction in given] == [record["label"] for record in REVIEWS]
    assert sum(given[0]["probability"].values()) == pytest.approx(1.0)
    assert (given[3]["text"], given[3]["id"]) == ("the bad food", "3")
    report = task.report([*REVIEWS, {"text": "a"}], [*given, given[0]])
    assert report.metrics["accuracy"] == report.metrics["f1_macro"] == 1.0
    assert report.confusion == [[3, 0], [0, 3]]
    assert report.errors == ()
    assert task.best.name in report.metrics
    with pytest.raises(DataError, match="no record has a label"):
        task.report([{"text": "a"}], given[:1])


def test_errors_are_listed_the_surest_first() -> None:
    task = bind(REVIEWS)
    shares = [("neg", 0.6), ("pos", 0.9), ("pos", 0.7)]
    given = [{"label": label, "probability": {label: p}} for label, p in shares]
    records = [
        {"text": "one", "label": "pos"},
        {"text": "two", "label": "neg", "where": "f:2"},
        {"text": "3", "label": "pos"},
    ]
    report = task.report(records, given)
    assert report.errors == (
        {"text": "two", "where": "f:2", "expected": "neg", "predicted": "pos", "probability": 0.9},
        {"text": "one", "expected": "pos", "predicted": "neg", "probability": 0.6},
    )
    assert report.confusion == [[0, 1], [1, 1]]


def test_several_labels() -> None:
    records = [
        {"text": "good film", "label": ["film", "good"]},
        {"text": "bad food", "label": ["food"]},
        {"text": "good food", "label": ["food", "good"]},
        {"text": "the", "label": []},
        {"text": "film", "label": ["film"]},
    ]
    task = bind(records)
    assert (task.problem, task.best.name) == ("multi_label", "f1_micro")
    assert task.head is not None
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    train(task, model, records, steps=150)
    given = predictions(task, model, records)
    assert [prediction["label"] for prediction in given] == [record["label"] for record in records]
    report = task.report(records, given)
    assert report.metrics["accuracy"] == report.metrics["f1_micro"] == 1.0
    wrong = task.report(records[:1], [{"label": ["good"], "probability": {}}])
    assert wrong.errors[0]["expected"] == ["film", "good"]


def test_numbers() -> None:
    rng = random.Random(0)
    records = []
    for _ in range(40):
        words = [rng.choice(["good", "bad", "film", "food"]) for _ in range(4)]
        records.append({"text": " ".join(words), "label": (words.count("good") - words.count("bad")) / 4})
    task = bind(records)
    assert task.problem == "regression"
    assert task.head is not None
    assert task.head.labels == ("value",)
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    train(task, model, records, steps=150)
    report = task.report(records, predictions(task, model, records))
    assert report.metrics["pearson"] > 0.98
    assert report.metrics["mse"] < 0.02
    assert task.report(records[:1], [{"label": 0.0}]).errors[0]["expected"] == records[0]["label"]


def test_evaluation_leaves_out_what_training_adds() -> None:
    task = bind(REVIEWS, class_weights={"pos": 3.0}, label_smoothing=0.2, focal_gamma=1.0, r_drop=2.0)
    plain = bind(REVIEWS)
    examples, _, _ = encode_all(task.encoder, REVIEWS)
    batch = collate(task.encoder.features, examples)
    model = TinyModel(task.head, TOKENIZER.vocab_size)
    assert float(task.evaluate(model, batch).loss_sum.detach()) == pytest.approx(
        float(plain.loss(model, batch).loss_sum.detach())
    )
    assert task.evaluate(model, batch).outputs["scores"].shape == (6, 2)


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        ([{"text": "good", "label": 0.5}], {"label_smoothing": 0.1}, "label_smoothing is 0.1.*problem regression"),
        ([{"text": "good", "label": 0.5}], {"class_weights": "auto"}, "class_weights is 'auto'.*regression"),
        ([{"text": "good", "label": ["a"]}], {"label_smoothing": 0.1}, "label_smoothing is 0.1.*problem multi_label"),
        ([{"text": "good", "label": "a"}], {"threshold": 0.3}, "threshold is 0.3.*problem single_label"),
    ],
)
def test_options_that_the_labels_make_idle_are_refused(records: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bind(records, **options)
    assert bind(records).problem in says
