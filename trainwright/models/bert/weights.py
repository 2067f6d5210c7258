"""Bert parameters in a Hugging Face file: the same tensors, some under other names.

BERT's language-model head stands under `cls.predictions`, and the dense layer of its head of texts is the trunk's
pooler there. RoBERTa's trunk begins with `roberta.`; `WeightFormat` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainwright.models.bert.config import BertConfig
from trainwright.models.weights import FilePart, WeightFormat

__all__ = ["BERT_WEIGHTS"]

_BERT_HEAD = {
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.decoder.weight": "cls.predictions.decoder.weight",
    "lm_head.decoder.bias": "cls.predictions.bias",
}
_BERT_TEXTS = {"classifier.dense.": "bert.pooler.dense.", "classifier.out_proj.": "classifier."}
_ROBERTA_HEAD = {"lm_head.decoder.bias": "lm_head.bias"}
_OTHER_NAMES = {"cls.predictions.decoder.bias": "cls.predictions.bias", "lm_head.decoder.bias": "lm_head.bias"}


def _parts(config: BertConfig, name: str, shape: Sequence[int]) -> list[FilePart]:
    table = dict(_BERT_HEAD if config.architecture == "bert" else _ROBERTA_HEAD)
    if config.architecture == "bert" and config.head is not None and config.head.kind == "sequence":
        table.update(_BERT_TEXTS)
    for ours, theirs in table.items():
        if name.startswith(ours):
            return [FilePart(theirs + name.removeprefix(ours), None)]
    return [FilePart(name, None)]


def _same(config: BertConfig, name: str, tensor: Tensor) -> Tensor:
    return tensor


def _file_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


def _zeros(config: BertConfig) -> dict[str, tuple[int, ...]]:
    return {}


def _other_name(name: str) -> str:
    if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):  # of the releases that were converted from TensorFlow
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return _OTHER_NAMES.get(name, name)


BERT_WEIGHTS = WeightFormat(
    prefix="bert.",
    to_file=_same,
    from_file=_same,
    file_shape=_file_shape,
    zeros=_zeros,
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    parts=_parts,
    other_name=_other_name,
    unused=("cls.seq_relationship.",),
)
