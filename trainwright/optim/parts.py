"""Where in a model a parameter stands, by its name: embeddings, a layer, or the top; for families that number layers.

Llama, Mistral, Qwen (`model.layers.3.`), GPT-2 (`transformer.h.3.`), GPT-NeoX (`gpt_neox.layers.3.`), BERT, RoBERTa and
DeBERTa (`bert.encoder.layer.3.`), T5 (`decoder.block.3.layer.1.`) and BART (`model.encoder.layers.3.`) are all alike:
the first number after a word for layers is the layer. A pipeline's stages keep these numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainwright.base.errors import ConfigError

__all__ = ["EMBEDDING_NAMES", "ModelParts"]

EMBEDDING_NAMES = (
    r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe|shared|embeddings|word_embeddings|position_embeddings"
    r"|token_type_embeddings|rel_embeddings|relative_attention_bias|tok_embeddings)(\.|$)"
)
"""Tables that are looked up, and what stands between them and the first layer."""

_EMBEDDING = re.compile(EMBEDDING_NAMES)
_BEFORE_LAYERS = re.compile(r"(^|\.)(layernorm_embedding|embeddings_project|embedding_hidden_mapping_in)(\.|$)")
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|blocks|block))\.(\d+)(?:\.|$)")
_FINAL_NORM = re.compile(r"(^|\.)(norm|ln_f|final_norm|final_layer_norm|final_layernorm)(\.|$)")
_PART = re.compile(r"layers\.(\d+)(?:-(\d+))?")


class ModelParts:
    """The parts of a model that has parameters of these names, on this process or elsewhere.

    Attributes:
        stacks: name of a stack of layers -> how many it has; an encoder-decoder has two.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.stacks: dict[str, int] = {}
        for name in self.names:
            if (place := layer_of(name)) is not None:
                stack, number = place
                self.stacks[stack] = max(self.stacks.get(stack, 0), number + 1)
        self._roots = {stack.split(".")[0] for stack in self.stacks}

    @property
    def layers(self) -> int:
        """Layers of the highest stack; 0 where names number none."""
        return max(self.stacks.values(), default=0)

    def depth(self, names: Sequence[str]) -> int:
        """How far below the top a parameter of these names stands: 0 the head and the final norm, 1 the last layer of
        its stack, and the embeddings one below the first layer. A tied parameter counts as what lies deepest."""
        return max(self._depth(name) for name in names)

    def _depth(self, name: str) -> int:
        place = layer_of(name)
        if place is not None:
            return self.stacks[place[0]] - place[1]
        return self.layers + 1 if is_embedding(name) else 0

    def holds(self, part: str, name: str) -> bool:
        """Whether a parameter of this name belongs to `part`: "embeddings", "head", "layers", "layers.N", "layers.N-M"
        (both included, in every stack) or "all_but_head"."""
        if part == "embeddings":
            return is_embedding(name)
        if part in ("head", "all_but_head"):
            return self._in_head(name) == (part == "head")
        place = layer_of(name)
        if place is None or part == "layers":
            return place is not None
        first, last = _range(part)
        return first <= place[1] <= last

    def _in_head(self, name: str) -> bool:
        """The head is what stands beside the trunk that holds the layers (transformers' `base_model`)."""
        inside = layer_of(name) is not None or is_embedding(name) or name.split(".")[0] in self._roots
        return not inside and not _FINAL_NORM.search(name)

    def check(self, part: str) -> None:
        """Refuse a part that this model does not have (ConfigError)."""
        if part.startswith("layers."):
            first, last = _range(part)
            if first > last or last >= self.layers:
                has = f"the model has layers 0 to {self.layers - 1}" if self.layers else "no layers are numbered"
                raise ConfigError(f"there is no part {part!r}: {has}", hint="layers.0-3 are the first four")
        elif not any(self.holds(part, name) for name in self.names):
            raise ConfigError(
                f"the model has no part {part!r}: no parameter is named like one",
                hint="use a rule with a pattern over names of parameters: optim.rules",
            )


def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, number) of the layer that a parameter is in; None outside layers."""
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else None


def is_embedding(name: str) -> bool:
    """Whether a parameter outside layers stands before the first one."""
    return layer_of(name) is None and bool(_EMBEDDING.search(name) or _BEFORE_LAYERS.search(name))


def _range(part: str) -> tuple[int, int]:
    found = _PART.fullmatch(part)
    if found is None:
        raise ConfigError(
            f"{part!r} names no part of a model",
            hint="embeddings, head, layers, layers.0, layers.0-3 or all_but_head",
        )
    return int(found[1]), int(found[2] or found[1])
