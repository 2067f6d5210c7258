"""Heads in a Hugging Face folder: which transformers class has the same one, what it calls its tensors, and what
config.json says of it.

A folder that we write carries the whole `HeadSpec` under a key of its own, which transformers keeps and ignores; in a
folder of another origin the head is read off the class that wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.heads import HeadSpec, head_fields, head_from_fields, head_module_name

__all__ = ["file_prefix", "head_from_hf", "head_to_hf", "is_head_tensor", "label_tensors", "trunk_class"]

KEY = "trainwright_head"
_CLASS_OF = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
_PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_WRITES = re.compile(r"For[A-Z]|LMHead")
"""In names of classes that are no trunks."""

_WITHOUT_HEADS = ("dots1",)  # transformers has no such classes for it
# Classes for extractive answers that call their trunk `transformer` "for backward compatibility".
_ANSWERING_TRANSFORMER = ("llama", "qwen2", "qwen3", "qwen3_moe")
_HEAD_TENSORS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.", "task_head_.")


def trunk_class(config: Any) -> str:
    """The transformers class of the trunk alone: "LlamaModel"."""
    (name,) = config.to_hf()["architectures"]
    return re.sub(r"(ForCausalLM|ForMaskedLM|LMHeadModel)$", "Model", name)


def head_to_hf(config: Any) -> dict[str, Any]:
    """What config.json says of the head of a configuration; empty for a language-model head.

    `architectures` names the class that gives the same scores, or, where transformers has none, the trunk's.
    """
    spec: HeadSpec | None = config.head
    if spec is None or config.family == "transformers":
        return {}
    trunk = trunk_class(config)
    values: dict[str, Any] = {"architectures": [trunk], KEY: head_fields(spec)}
    if spec.kind in _CLASS_OF and config.to_hf()["model_type"] not in _WITHOUT_HEADS and not _pools_otherwise(config):
        values["architectures"] = [trunk.removesuffix("Model") + _CLASS_OF[spec.kind]]
    if spec.kind in ("embedding", "span"):
        return values
    values["id2label"] = {str(index): label for index, label in enumerate(spec.labels)}
    values["label2id"] = {label: index for index, label in enumerate(spec.labels)}
    values["classifier_dropout"] = spec.dropout
    if spec.kind == "sequence":
        values["problem_type"] = _PROBLEMS[spec.problem]
    return values


def _pools_otherwise(config: Any) -> bool:
    usual = "first" if config.family == "bert" else "last"
    return config.head.kind == "sequence" and config.head.pooling not in ("auto", usual)


def head_from_hf(values: Mapping[str, Any]) -> HeadSpec | None:
    """The head that a parsed `config.json` describes; None for a language-model head or a trunk alone.

    transformers carries our key along when it saves a folder under another head or with other labels. So the key counts
    where `architectures` and the labels still say the same.

    Raises:
        ModelError: the labels are not numbered from 0.
    """
    name = str((values.get("architectures") or [""])[0])
    written = values.get(KEY)
    ours = head_from_fields(written) if isinstance(written, Mapping) else None
    kind = next((kind for kind, ending in _CLASS_OF.items() if name.endswith(ending)), None)
    if kind is None:
        return None if _WRITES.search(name) else ours
    theirs = _head_of_class(kind, values)
    if ours is None or ours.kind != kind:
        return theirs
    same = kind == "span" or (ours.labels, ours.problem) == (theirs.labels, theirs.problem)
    return ours if same else theirs


def _head_of_class(kind: Any, values: Mapping[str, Any]) -> HeadSpec:
    if kind == "span":
        return HeadSpec("span", dropout=0.0)
    if kind == "token":
        return HeadSpec("token", _labels(values), dropout=_dropout(values, kind))
    labels = _labels(values)
    problems: dict[str, Any] = {written: ours for ours, written in _PROBLEMS.items()}
    # As transformers has it: one score that nothing is said about is a number.
    problem = problems.get(str(values.get("problem_type")), "regression" if len(labels) == 1 else "single_label")
    return HeadSpec(kind, labels, dropout=_dropout(values, kind), problem=problem)


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    named = values.get("id2label")
    if not isinstance(named, Mapping):
        return tuple(f"LABEL_{index}" for index in range(int(values.get("num_labels", 2))))
    try:
        by_number = {int(index): str(label) for index, label in named.items()}
    except ValueError:
        by_number = {}
    if sorted(by_number) != list(range(len(named))):
        raise ModelError(f"config.json: id2label has the keys {list(named)[:6]}; expected numbers from 0")
    return tuple(by_number[index] for index in range(len(by_number)))


def _dropout(values: Mapping[str, Any], kind: str) -> float:
    given = values.get("classifier_dropout")
    if given is None:
        given = values.get("hidden_dropout_prob", 0.1 if kind == "token" else 0.0)
    return float(given)


def file_prefix(config: Any, prefix: str) -> str:
    """What the tensors of the trunk begin with in the folder of a configuration; `prefix` is what ours begin with."""
    if config.family == "transformers":
        return prefix
    if config.family == "bert":
        return "bert." if config.architecture == "bert" else "roberta."
    answers = config.head is not None and config.head.kind == "span"
    return "transformer." if answers and config.to_hf()["model_type"] in _ANSWERING_TRANSFORMER else prefix


def is_head_tensor(name: str) -> bool:
    """Whether a tensor of a file is a head's, by its name there; so is BERT's pooler, which only heads use."""
    return name.startswith(_HEAD_TENSORS) or ".pooler." in f".{name}"


def label_tensors(config: Any, names: list[str]) -> list[str]:
    """Of our parameters those whose rows are the labels of the configuration's head."""
    if config.head is None:
        return []
    head = head_module_name(config.to_hf()["model_type"], config.head.kind)
    return [name for name in names if name.startswith(f"{head}.") and ".dense." not in name]
