"""What a bert-family model is: BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692) and XLM-RoBERTa are one block.

A configuration is checked when it is made, so that everything that exists can be built, saved and opened by
transformers. Reading and writing `config.json` is in `hf_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.checks import positive, probability
from trainwright.models.heads import HeadSpec, check_head
from trainwright.ops.activation import activation

__all__ = ["BERT_ARCHITECTURES", "BertConfig"]

BERT_ARCHITECTURES = ("bert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class BertConfig:
    """Sizes and switches of one bert-family model.

    architecture: the transformers class it is saved as. RoBERTa has no kinds of tokens, and its positions begin behind
        the padding token's number.
    max_position_embeddings: tokens of the longest text. RoBERTa's table and its `config.json` count
        `position_offset` more.
    type_vocab_size: kinds of tokens (which of two texts one is of).
    hidden_dropout, attention_dropout: after the embedding and before each residual sum; on attention weights.
    head: what stands on the trunk in place of the language-model head.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    architecture: str = "bert"
    type_vocab_size: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = 0
    head: HeadSpec | None = None

    @property
    def family(self) -> str:
        return "bert"

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_offset(self) -> int:
        """The row of the position table that the first token gets."""
        return 0 if self.architecture == "bert" else (self.pad_token_id or 0) + 1

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "type_vocab_size"):
            positive(name, getattr(self, name))
        positive("max_position_embeddings", self.max_position_embeddings)
        positive("layer_norm_eps", self.layer_norm_eps)
        for name in ("hidden_dropout", "attention_dropout"):
            probability(name, getattr(self, name))
        activation(self.activation)
        if self.architecture not in BERT_ARCHITECTURES:
            raise ModelError(f"architecture={self.architecture!r}; expected one of {', '.join(BERT_ARCHITECTURES)}")
        if self.architecture != "bert" and self.pad_token_id is None:
            raise ModelError(
                f"architecture {self.architecture!r} needs a pad_token_id: its positions begin behind that number"
            )
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}",
                hint="choose num_heads from the divisors of hidden_size",
            )

    def layer_windows(self) -> list[int | None]:
        """No layer has a sliding window."""
        return [None] * self.num_layers

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model."""
        from trainwright.models.bert.hf_config import to_hf

        return to_hf(self)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> BertConfig:
        """From a parsed `config.json`; ModelError names what is unsupported."""
        from trainwright.models.bert.hf_config import from_hf

        return from_hf(values)
