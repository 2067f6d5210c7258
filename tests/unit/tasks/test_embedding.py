"""Embeddings: InfoNCE as it is written, equal texts are no negatives, ranks gather with gradients, retrieval."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import DataError
from trainwright.config.tasks import EmbeddingSection
from trainwright.data.examples.example import IGNORE, Example
from trainwright.data.tokenizers import Tokenizer, train_tokenizer
from trainwright.models import LlamaConfig, build_model
from trainwright.models.attach import attach_head
from trainwright.tasks.contrastive import NO_TEXT, Texts, contrastive_loss, gathered
from trainwright.tasks.embedding import Embedding, EmbeddingDefinition
from trainwright.tasks.registry import DEFINITIONS
from trainwright.testing import run_ranks, tiny_llama_config

RECORDS = [
    {"anchor": "what is a cat", "positive": "a cat is an animal", "negatives": ["dogs bark", "今天下雨"]},
    {"anchor": "北京天气", "positive": "今天天气很好", "negatives": ["a cat is an animal", "x"]},
    {"anchor": "sum of two", "positive": "1 + 1 = 2", "negatives": ["far away", "y z"]},
]


def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", 380, ["what is a cat an animal dogs bark 今天天气很好 下雨 北京 1 + 1 = 2 "] * 8)


def task_of(max_length: int = 32, **options: Any) -> Embedding:
    section = EmbeddingSection(name="embedding", **options)
    return EmbeddingDefinition(section, max_length).bind({}, tokenizer())


def batch_of(task: Embedding, records: Sequence[dict[str, Any]] = RECORDS) -> dict[str, Tensor]:
    """As the data room makes it: every feature padded at the end on its own."""
    examples: list[Example] = [task.encoder.encode(record).examples[0] for record in records]
    batch: dict[str, Tensor] = {"lengths": torch.tensor([example.length for example in examples])}
    for feature in task.encoder.features:
        rows = [example.arrays[feature.name] for example in examples]
        if feature.axis != "row":
            width = max(map(len, rows))
            rows = [np.pad(row, (0, width - len(row)), constant_values=3) for row in rows]
        batch[feature.name] = torch.from_numpy(np.stack(rows).astype(np.int64))
    return batch


def model_of(task: Embedding, **changes: Any) -> Any:
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=400, **changes)), dtype=torch.float64)
    assert task.head is not None
    return attach_head(model, task.head)


# ---- the loss


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=-1)


def test_infonce_is_cross_entropy_over_the_batch() -> None:
    a, p = unit(4, 0), unit(4, 1)
    keys = torch.arange(1, 5)
    loss, count = contrastive_loss(Texts(a, keys), Texts(p, keys + 10), Texts(p, keys + 10), place=0, temperature=0.1)
    expected = F.cross_entropy(a @ p.T / 0.1, torch.arange(4), reduction="sum")
    assert abs(float(loss - expected)) < 1e-12
    assert int(count) == 4
    both, _ = contrastive_loss(
        Texts(a, keys), Texts(p, keys + 10), Texts(p, keys + 10), place=0, temperature=0.1, other_anchors=Texts(a, keys)
    )
    back = F.cross_entropy(p @ a.T / 0.1, torch.arange(4), reduction="sum")
    assert abs(float(both - (expected + back) / 2)) < 1e-12


def test_equal_texts_and_missing_ones_are_no_negatives() -> None:
    """Rows 0 and 2 have the same positive; row 3 has none; the last candidate is no text."""
    a, p, n = unit(4, 0), unit(4, 1), unit(2, 2)
    p[2] = p[0]
    keys = torch.tensor([11, 12, 11, NO_TEXT])
    candidates = Texts(torch.cat((p, n)), torch.cat((keys, torch.tensor([13, NO_TEXT]))))
    loss, count = contrastive_loss(Texts(a, torch.arange(1, 5)), Texts(p, keys), candidates, place=0, temperature=0.5)
    expected = 0.0
    for row, columns in ((0, [0, 1, 4]), (1, [1, 0, 2, 4]), (2, [2, 1, 4])):
        scores = a[row] @ candidates.vectors[columns].T / 0.5
        expected += float(torch.logsumexp(scores, 0) - scores[0])
    assert abs(float(loss) - expected) < 1e-12
    assert int(count) == 3


def test_the_loss_of_a_batch_is_that_of_its_texts_alone() -> None:
    """One forward pass over all texts, padded beside each other, gives what each text gives alone."""
    for pooling in ("mean", "last", "first"):
        task = task_of(negatives=2, pooling=pooling, temperature=0.2)
        model = model_of(task)
        output = task.loss(model, batch_of(task))
        texts = [[r["anchor"] for r in RECORDS], [r["positive"] for r in RECORDS]]
        texts += [[r["negatives"][n] for r in RECORDS] for n in (0, 1)]
        end = [task.tokenizer.eos_id]
        vectors = [
            torch.cat([model.scores({"input_ids": torch.tensor([task.tokenizer.encode(t) + end])}) for t in of_kind])
            for of_kind in texts
        ]
        candidates = torch.cat(vectors[1:])
        scores = vectors[0].double() @ candidates.double().T / 0.2
        scores[0, 3 + 1] = -torch.inf  # row 1's first negative is row 0's positive
        expected = F.cross_entropy(scores, torch.arange(3), reduction="sum")
        assert abs(float((output.loss_sum - expected).detach())) < 1e-5, pooling
        assert int(output.count) == 3


def test_training_brings_partners_together() -> None:
    torch.manual_seed(0)
    task = task_of()
    model = model_of(task).float()
    batch = batch_of(task)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = task.loss(model, batch)
        (output.loss_sum / output.count).backward()
        optimizer.step()
        losses.append(float((output.loss_sum / output.count).detach()))
    assert losses[-1] < 0.01 < losses[0]
    outputs = task.evaluate(model, batch).outputs
    assert outputs is not None
    found = task.predict(RECORDS, [{k: [v[i].detach().numpy()] for k, v in outputs.items()} for i in range(3)])
    report = task.report(RECORDS, found)
    assert report.metrics["recall@1"] == report.metrics["mrr"] == report.metrics["ndcg@10"] == 1.0


def test_texts_of_one_record_are_dropped_differently() -> None:
    """SimCSE trains on the same text twice: only dropout tells anchor and positive apart."""
    task = task_of()
    model = model_of(task, attention_dropout=0.3).train()
    batch = batch_of(task, [{"anchor": "a cat is an animal", "positive": "a cat is an animal"}] * 2)
    model.set_dropout(seed=5, rows=torch.tensor([7, 9]))
    anchors, positives = task._vectors(model, batch)
    assert not torch.allclose(anchors, positives, atol=1e-3)
    assert not torch.allclose(anchors[0], anchors[1], atol=1e-3)
    model.set_dropout(seed=5, rows=torch.tensor([9, 7]))
    again, _ = task._vectors(model, batch)
    assert torch.allclose(again.flip(0), anchors)


def two_ranks(rank: int, size: int, gather: bool) -> list[Any]:
    """Each rank brings its half of the rows; the sum of losses and gradients comes back."""
    task = task_of(negatives=1, symmetric=True, gather=gather)
    task.group = dist.group.WORLD
    model = model_of(task)
    records = [*RECORDS, {"anchor": "four", "positive": "4 4", "negatives": ["q"]}]
    output = task.loss(model, batch_of(task, records[rank * 2 : rank * 2 + 2]))
    output.loss_sum.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    dist.all_reduce(gradients)
    loss = output.loss_sum.detach().clone()
    dist.all_reduce(loss)
    plain = Texts(torch.arange(2.0).reshape(2, 1) + 10 * rank, torch.arange(2) + 10 * rank)
    texts, place = gathered(plain, dist.group.WORLD)
    return [float(loss), gradients.tolist(), texts.vectors.flatten().tolist(), texts.keys.tolist(), place, size]


def test_gathered_negatives_are_those_of_one_process_with_all_rows() -> None:
    task = task_of(negatives=1, symmetric=True)
    model = model_of(task)
    records = [*RECORDS, {"anchor": "four", "positive": "4 4", "negatives": ["q"]}]
    output = task.loss(model, batch_of(task, records))
    output.loss_sum.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for rank, found in enumerate(run_ranks(two_ranks, 2, True)):
        loss, gradients, vectors, keys, place, size = found
        assert abs(loss - float(output.loss_sum.detach())) < 1e-9
        assert float((torch.tensor(gradients, dtype=torch.float64) - expected).abs().max()) < 1e-9
        assert vectors == [0, 1, 10, 11]
        assert keys == [0, 1, 10, 11]
        assert (place, size) == (2 * rank, 2)


# ---- examples and reports


def test_features_of_a_record() -> None:
    task = task_of(negatives=2, query_prefix="query: ", passage_prefix="passage: ")
    (example,) = task.encoder.encode(RECORDS[0]).examples
    decode = task.tokenizer.decode
    assert decode(example.arrays["input_ids"], skip_special=False) == "query: what is a cat<|endoftext|>"
    assert decode(example.arrays["positive_ids"], skip_special=False) == "passage: a cat is an animal<|endoftext|>"
    assert decode(example.arrays["negative1_ids"]) == "passage: 今天下雨"
    lengths = [len(example.arrays[name]) for name in ("positive_ids", "negative0_ids", "negative1_ids")]
    assert example.arrays["text_lengths"].tolist() == lengths
    keys = example.arrays["text_keys"].tolist()
    assert len(set(keys)) == 4
    assert NO_TEXT not in keys
    other = task.encoder.encode(RECORDS[1]).examples[0].arrays["text_keys"].tolist()
    assert other[2] == keys[1]  # the same text
    assert not task.encoder.packable


def test_long_texts_are_cut_and_counted() -> None:
    task = task_of(8)
    encoded = task.encoder.encode({"anchor": "what is a cat " * 20, "positive": "x"})
    assert encoded.examples[0].length <= 8
    assert encoded.examples[0].arrays["input_ids"][-1] == task.tokenizer.eos_id
    assert encoded.cut_tokens > 10


def test_records_without_partners() -> None:
    task = task_of(negatives=1)
    (example,) = task.encoder.encode({"anchor": "only to embed"}).examples
    assert example.arrays["labels"] == IGNORE
    assert example.arrays["text_keys"].tolist()[1:] == [NO_TEXT, NO_TEXT]
    batch = batch_of(task, [{"anchor": "only to embed"}, *RECORDS[:2]])
    output = task.evaluate(model_of(task), batch)
    assert int(output.count) == 2
    assert bool(torch.isfinite(output.loss_sum))
    with pytest.raises(DataError, match="no anchor"):
        task.encoder.encode({"positive": "x"})
    with pytest.raises(DataError, match=r"0 negatives; task.negatives asks for 1"):
        task.encoder.encode({"anchor": "x", "positive": "y"})
    (vector,) = task.predict([{"anchor": "x"}], [{"anchor": [np.ones(3)], "positive": [np.ones(3)]}])
    assert vector == {"anchor": [1.0, 1.0, 1.0]}
    with pytest.raises(DataError, match="no record has a positive to find"):
        task.report([{"anchor": "x"}], [vector])
    whole = {"anchor": [1.0, 0.0, 0.0], "positive": [1.0, 0.0, 0.0]}
    report = task.report([{"anchor": "x"}, {"anchor": "y", "positive": "z"}], [vector, whole])
    assert "1 queries, every one searched among 1 texts" in report.tables[0].notes[0], "a lone anchor asks for nothing"


def test_reports_count_equal_texts_once() -> None:
    """Two anchors share a positive, one anchor has two: three documents, two queries."""
    task = task_of()
    records = [
        {"anchor": "q1", "positive": "d1"},
        {"anchor": "q1", "positive": "d2"},
        {"anchor": "q2", "positive": "d1"},
        {"anchor": "q3", "positive": "d3"},
    ]
    axes = np.eye(3)
    vectors = {
        "q1": axes[0] * 0.9 + axes[1] * 0.1,
        "q2": axes[1],
        "q3": axes[2],
        "d1": axes[0],
        "d2": axes[1],
        "d3": axes[2],
    }
    predictions = [{"anchor": vectors[r["anchor"]], "positive": vectors[r["positive"]]} for r in records]
    report = task.report(records, predictions)
    assert report.metrics["recall@1"] == pytest.approx(2 / 3)
    assert report.metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert [dict(error) for error in report.errors] == [{"text": "q2", "expected": "d1", "predicted": "d2"}]
    assert "3 queries, every one searched among 3 texts" in report.tables[0].notes[0]


def test_the_definition() -> None:
    definition = DEFINITIONS["embedding"](EmbeddingSection(name="embedding", frame="encoder"), 16)
    assert definition.shape == "anchors"
    assert "[CLS]" in EmbeddingDefinition(EmbeddingSection(name="embedding", frame="encoder"), 16).special_tokens
    task = task_of()
    again = pickle.loads(pickle.dumps(task.encoder))
    assert again.fingerprint == task.encoder.fingerprint != task_of(negatives=1).encoder.fingerprint
    assert task.head is not None
    assert task.head.pooling == "mean"
