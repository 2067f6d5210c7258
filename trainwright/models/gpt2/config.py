"""What a gpt2-family model is: GPT-2 itself, and nanoGPT's variant without biases and with the exact GELU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.checks import positive, probability
from trainwright.models.heads import HeadSpec, check_head
from trainwright.models.hf_fields import integer, number, refuse_unsupported, token_ids, token_ids_to_hf
from trainwright.ops.activation import activation

__all__ = ["GPT2Config"]


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and switches of one gpt2-family model.

    intermediate_size: width of the feed-forward half; GPT-2 uses 4 * hidden_size.
    bias: biases in linears and norms. Without (nanoGPT), the Hugging Face folder gets zero biases: the same model.
    embd_dropout, attn_dropout, resid_dropout: after the embedding, on attention weights, before each residual sum.
    head: what stands on the trunk in place of the language-model head.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 1024
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    bias: bool = True
    embd_dropout: float = 0.0
    attn_dropout: float = 0.0
    resid_dropout: float = 0.0
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    head: HeadSpec | None = None

    @property
    def family(self) -> str:
        return "gpt2"

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            positive(name, getattr(self, name))
        positive("max_position_embeddings", self.max_position_embeddings)
        positive("layer_norm_eps", self.layer_norm_eps)
        for name in ("embd_dropout", "attn_dropout", "resid_dropout"):
            probability(name, getattr(self, name))
        activation(self.activation)
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}",
                hint="choose num_heads from the divisors of hidden_size",
            )

    def layer_windows(self) -> list[int | None]:
        """No layer has a sliding window."""
        return [None] * self.num_layers

    def attention_scale(self, layer: int) -> float:
        """What attention scores are multiplied by in one layer."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers opens as the same model."""
        values: dict[str, Any] = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_inner": self.intermediate_size,
            "n_positions": self.max_position_embeddings,
            "n_ctx": self.max_position_embeddings,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.layer_norm_eps,
            "embd_pdrop": self.embd_dropout,
            "attn_pdrop": self.attn_dropout,
            "resid_pdrop": self.resid_dropout,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids_to_hf(self.eos_token_id),
            "pad_token_id": self.pad_token_id,
        }
        if not self.bias:
            values["bias"] = False  # not a key of transformers, which keeps it; read back by `from_hf`
        return values

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> GPT2Config:
        """From a parsed `config.json`; ModelError names what is missing or unsupported."""
        refuse_unsupported(values, {"add_cross_attention": (False,)})
        hidden_size = integer(values, "n_embd")
        return cls(
            vocab_size=integer(values, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=integer(values, "n_layer"),
            num_heads=integer(values, "n_head"),
            intermediate_size=integer(values, "n_inner", default=4 * hidden_size),
            max_position_embeddings=integer(values, "n_positions", default=1024),
            activation=str(values.get("activation_function", "gelu_new")),
            layer_norm_eps=number(values, "layer_norm_epsilon", default=1e-5),
            bias=bool(values.get("bias", True)),
            embd_dropout=number(values, "embd_pdrop", default=0.1),
            attn_dropout=number(values, "attn_pdrop", default=0.1),
            resid_dropout=number(values, "resid_pdrop", default=0.1),
            scale_attn_weights=bool(values.get("scale_attn_weights", True)),
            scale_attn_by_inverse_layer_idx=bool(values.get("scale_attn_by_inverse_layer_idx", False)),
            tie_embeddings=bool(values.get("tie_word_embeddings", True)),
            initializer_range=number(values, "initializer_range", default=0.02),
            bos_token_id=integer(values, "bos_token_id", default=None),
            eos_token_id=token_ids(values, "eos_token_id"),
            pad_token_id=integer(values, "pad_token_id", default=None),
        )
