"""What a llama-family model is: Llama 2/3, Mistral, Qwen 2/3 are one block with a few switches.

A configuration is checked when it is made, so that everything that exists can be built, saved and opened by
transformers. Reading and writing `config.json` is in `hf_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.checks import positive, probability
from trainwright.models.heads import HeadSpec, check_head
from trainwright.ops.rotary import RotaryLayout, RotaryScaling

__all__ = ["ARCHITECTURES", "LlamaConfig"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of one llama-family model.

    architecture: the transformers class it is saved as; decides which switches are allowed.
    num_kv_heads: key/value heads (grouped-query attention, arXiv 2305.13245); divides num_heads.
    rotary_layout: `half` pairs dimension i with i + head_dim / 2 (transformers); `interleaved` pairs 2i with 2i + 1
        (Meta's own weights, llama2.c). Saving to a Hugging Face folder reorders the rows to `half`.
    qkv_bias, output_bias, mlp_bias: biases on q/k/v, on the attention output, and on the three MLP linears.
    qk_norm: RMSNorm over head_dim on queries and keys (Qwen 3).
    sliding_window: a token sees itself and `sliding_window - 1` tokens before it, in the layers of `sliding_layers`
        (None: every layer).
    head: what stands on the trunk in place of the language-model head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    architecture: str = "llama"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    rotary_layout: RotaryLayout = "half"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    head: HeadSpec | None = None

    @property
    def family(self) -> str:
        return "llama"

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            positive(name, getattr(self, name))
        for name in ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
            positive(name, getattr(self, name))
        probability("attention_dropout", self.attention_dropout)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
                hint="choose num_kv_heads from the divisors of num_heads",
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of dimensions")
        if self.rotary_layout not in ("half", "interleaved"):
            raise ModelError(f"rotary_layout={self.rotary_layout!r}; expected 'half' or 'interleaved'")
        self._check_architecture()
        self._check_sliding()

    def _check_architecture(self) -> None:
        allowed: dict[str, dict[str, tuple[Any, ...]]] = {
            "llama": {"qk_norm": (False,), "sliding_window": (None,), "output_bias": (self.qkv_bias,)},
            "mistral": {"qk_norm": (False,), "qkv_bias": (False,), "output_bias": (False,), "mlp_bias": (False,)},
            "qwen2": {"qk_norm": (False,), "qkv_bias": (True,), "output_bias": (False,), "mlp_bias": (False,)},
            "qwen3": {"qk_norm": (True,), "output_bias": (self.qkv_bias,), "mlp_bias": (False,)},
        }
        if self.architecture not in allowed:
            raise ModelError(f"architecture={self.architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
        for name, values in allowed[self.architecture].items():
            if getattr(self, name) not in values:
                raise ModelError(
                    f"architecture {self.architecture!r} cannot have {name}={getattr(self, name)!r} "
                    f"(expected {' or '.join(map(repr, values))}): transformers could not open the model",
                    hint="sliding window: mistral or qwen2; q/k/v bias alone: qwen2; q/k norm: qwen3",
                )

    def _check_sliding(self) -> None:
        if self.sliding_window is None:
            if self.sliding_layers is not None:
                raise ModelError("sliding_layers is given but sliding_window is None")
            return
        positive("sliding_window", self.sliding_window)
        if self.sliding_layers is None:
            return
        if self.architecture == "mistral":
            raise ModelError("architecture 'mistral' slides in every layer; sliding_layers must be None")
        wrong = [layer for layer in self.sliding_layers if not 0 <= layer < self.num_layers]
        if wrong or list(self.sliding_layers) != sorted(set(self.sliding_layers)):
            raise ModelError(f"sliding_layers={self.sliding_layers}: expected ascending layers below {self.num_layers}")

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer in tokens, or None where it sees everything before."""
        if self.sliding_window is None or (self.sliding_layers is not None and layer not in self.sliding_layers):
            return None
        return self.sliding_window

    def layer_windows(self) -> list[int | None]:
        """`window_of` every layer."""
        return [self.window_of(layer) for layer in range(self.num_layers)]

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model."""
        from trainwright.models.llama.hf_config import to_hf

        return to_hf(self)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> LlamaConfig:
        """From a parsed `config.json`; ModelError names what is unsupported."""
        from trainwright.models.llama.hf_config import from_hf

        return from_hf(values)
