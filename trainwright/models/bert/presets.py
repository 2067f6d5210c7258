"""Named sizes of the bert family: Google's four of arXiv 1908.08962 and BERT-base, and RoBERTa-base."""

from __future__ import annotations

from trainwright.models.bert.config import BertConfig

__all__ = ["BERT_PRESETS"]


def _bert(layers: int, hidden: int) -> BertConfig:
    return BertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )


BERT_PRESETS: dict[str, BertConfig] = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-medium": _bert(8, 512),
    "bert-base": _bert(12, 768),
    "roberta-base": BertConfig(
        vocab_size=50265,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        architecture="roberta",
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
}
