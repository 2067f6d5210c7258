"""A tokenizer of words and a model of a few numbers, with the interface that tasks use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers as rust
import torch
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

from trainwright.data.examples.example import Encoded, Example, Feature
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.crf import LinearChainCRF
from trainwright.models.dropout import DropoutPlace
from trainwright.models.heads import HeadSpec

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_tokenizer(words: Sequence[str], *, framed: bool = True, extra: Sequence[str] = ()) -> Tokenizer:
    """Whole words and single letters; `framed` puts [CLS] and [SEP] around texts, as BERT's does."""
    letters = sorted({letter for word in words for letter in word})
    names = [*SPECIAL, "<eos>", *extra, *dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = rust.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=50))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens([*SPECIAL, "<eos>", *extra])
    if framed:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    roles = {"pad": "[PAD]", "unk": "[UNK]"}
    roles |= {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"} if framed else {"eos": "<eos>"}
    return Tokenizer(core, special=roles)


def collate(features: Sequence[Feature], examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch as the dataset makes it: padded at the end, with lengths and key_mask."""
    batch: dict[str, Tensor] = {}
    for feature in features:
        values = [np.asarray(example.arrays[feature.name]) for example in examples]
        if feature.axis == "row":
            stacked = np.stack([value.reshape(feature.shape) for value in values])
        else:
            width = max(len(value) for value in values)
            stacked = np.full((len(values), width, *feature.shape), feature.pad, dtype=values[0].dtype)
            for row, value in enumerate(values):
                stacked[row, : len(value)] = value
        wide = stacked.astype(np.int64 if np.issubdtype(stacked.dtype, np.integer) else np.float32)
        batch[feature.name] = torch.from_numpy(wide)
    lengths = torch.tensor([example.length for example in examples])
    batch["lengths"] = lengths
    batch["key_mask"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return batch


def encode_all(encoder: Any, records: Sequence[Mapping[str, Any]]) -> tuple[list[Example], list[int], list[Encoded]]:
    """Examples of records, the record of each, and what the encoder said."""
    encoded = [encoder.encode(record) for record in records]
    examples = [example for one in encoded for example in one.examples]
    owners = [index for index, one in enumerate(encoded) for _ in one.examples]
    return examples, owners, encoded


class TinyModel(nn.Module):
    """Means of embeddings and a window of neighbours under a head, with dropout on the embeddings."""

    def __init__(self, spec: HeadSpec, vocab_size: int, *, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec = spec
        outputs = 2 if spec.kind == "span" else len(spec.labels)
        self.embedding = nn.Embedding(vocab_size, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.task_head: Any = nn.Linear(2 * width if spec.kind == "entities" else width, outputs)
        if spec.crf:
            self.task_head.crf = LinearChainCRF(outputs)
        self.dropout_place = DropoutPlace()

    def auxiliary_loss(self, labels: Tensor) -> Tensor | None:
        return None

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch["key_mask"][..., None]
        embedded = self.dropout(self.embedding(batch["input_ids"])) * mask
        hidden = embedded + torch.tanh(self.mix(embedded.transpose(1, 2)).transpose(1, 2)) * mask
        if self.spec.kind == "sequence":
            hidden = hidden.sum(1) / mask.sum(1)
        if self.spec.kind == "entities":
            places = batch["entity_starts"][..., None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, places).flatten(1)
        return self.task_head(hidden)


def predictions(task: Any, model: Any, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a task predicts of records, in batches of three."""
    examples, owners, _ = encode_all(task.encoder, records)
    outputs: list[dict[str, Any]] = []
    model.eval()
    with torch.no_grad():
        for first in range(0, len(examples), 3):
            batch = collate(task.encoder.features, examples[first : first + 3])
            given = task.evaluate(model, batch).outputs
            rows = len(batch["input_ids"])
            outputs += [{name: value[row].numpy() for name, value in given.items()} for row in range(rows)]
    grouped = []
    for record in range(len(records)):
        mine = [index for index, owner in enumerate(owners) if owner == record]
        named = {name: [outputs[index][name] for index in mine] for name in outputs[0]}
        grouped.append({**named, "pieces": [examples[index].piece for index in mine]})
    return task.predict(records, grouped)


def train(task: Any, model: nn.Module, records: Sequence[Mapping[str, Any]], *, steps: int, lr: float = 0.02) -> float:
    """Full-batch Adam; returns the last loss."""
    examples, _, _ = encode_all(task.encoder, records)
    batch = collate(task.encoder.features, examples)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        output = task.loss(model, batch)
        loss = output.loss_sum / output.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def placed(seed: int, rows: Tensor) -> SimpleNamespace:
    """What `model.dropout_place` tells of a step."""
    return SimpleNamespace(seed=seed, rows=rows)
