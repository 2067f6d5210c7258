"""`config.json` of BERT, RoBERTa and XLM-RoBERTa."""

from __future__ import annotations

from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.bert.config import BertConfig
from trainwright.models.hf_fields import integer, number, refuse_unsupported, required, token_ids, token_ids_to_hf

__all__ = ["HF_CLASSES", "from_hf", "to_hf"]

HF_CLASSES = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "xlm-roberta": "XLMRobertaForMaskedLM"}

# Defaults that transformers fills in when a config.json omits the key.
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "vocab_size": 30522,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {**_BASE, "pad_token_id": 0},
    "roberta": {**_BASE, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "xlm-roberta": {**_BASE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}


def from_hf(values: dict[str, Any]) -> BertConfig:
    """A parsed `config.json` as a BertConfig.

    Raises:
        ModelError: a key is missing, has the wrong type, or asks for something that is not supported.
    """
    architecture = str(required(values, "model_type"))
    if architecture not in HF_CLASSES:
        raise ModelError(f"model_type={architecture!r} is not of the bert family ({', '.join(HF_CLASSES)})")
    values = {**_DEFAULTS[architecture], **values}
    refuse_unsupported(
        values,
        {
            "is_decoder": (False, None),
            "add_cross_attention": (False, None),
            "position_embedding_type": ("absolute", None),
            "pruned_heads": ({}, None),
        },
    )
    pad = integer(values, "pad_token_id", default=None)
    offset = 0 if architecture == "bert" else (pad or 0) + 1
    return BertConfig(
        vocab_size=integer(values, "vocab_size"),
        hidden_size=integer(values, "hidden_size"),
        num_layers=integer(values, "num_hidden_layers"),
        num_heads=integer(values, "num_attention_heads"),
        intermediate_size=integer(values, "intermediate_size"),
        max_position_embeddings=integer(values, "max_position_embeddings") - offset,
        architecture=architecture,
        type_vocab_size=integer(values, "type_vocab_size"),
        activation=str(values["hidden_act"]),
        layer_norm_eps=number(values, "layer_norm_eps"),
        hidden_dropout=number(values, "hidden_dropout_prob"),
        attention_dropout=number(values, "attention_probs_dropout_prob"),
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        initializer_range=number(values, "initializer_range", default=0.02),
        bos_token_id=integer(values, "bos_token_id", default=None),
        eos_token_id=token_ids(values, "eos_token_id"),
        pad_token_id=pad,
    )


def to_hf(config: BertConfig) -> dict[str, Any]:
    """The `config.json` that transformers opens as the same model."""
    return {
        "architectures": [HF_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings + config.position_offset,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
    }
