"""One part of a Hugging Face decoder: its own trunk runs, on hidden states instead of tokens, with the blocks that are
here; what belongs to other parts lets through what it gets.

So masks, rotary tables and the calls of blocks stay the model's own, whatever they are in its version. What may not be
in such a trunk, because it would then run in every part: layers of its own between the embedding and the blocks, or a
factor on the embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError
from trainwright.parallel.blocks import find_blocks
from trainwright.parallel.pipeline.parts import Anatomy, Part, Split
from trainwright.parallel.pipeline.stack import StageLayers

__all__ = ["HuggingFaceStage", "hugging_face_anatomy"]

_SCALED = ("embedding_multiplier", "scale_emb", "emb_scale", "embed_scale", "logits_scaling", "logit_scale")
"""Fields of configurations by which a model multiplies its embedding or its logits."""


def hugging_face_anatomy(model: nn.Module) -> Anatomy:
    """Where the parts of a Hugging Face causal language model are, found by structure.

    Raises:
        ConfigError: it has no such structure; names what was expected.
    """
    embedding, head = _embeddings(model)
    found = find_blocks(model)
    if not found:
        raise _unknown(model, "it has no list of equal blocks")
    stack_name = found[0][0].rpartition(".")[0]
    if any(name.rpartition(".")[0] != stack_name for name, _ in found):
        raise _unknown(model, "it has more than one list of blocks")
    trunk_name, _, stack_leaf = stack_name.rpartition(".")
    trunk = model.get_submodule(trunk_name)
    names = {id(module): name for name, module in model.named_modules()}
    positions, norms = [], []
    after_stack = False
    for leaf, child in trunk.named_children():
        name = f"{trunk_name}.{leaf}" if trunk_name else leaf
        after_stack = after_stack or leaf == stack_leaf
        if leaf == stack_leaf or child is embedding or not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.Embedding):
            positions.append(name)
        elif after_stack and "norm" in type(child).__name__.lower():
            norms.append(name)
        else:
            raise _unknown(model, f"{name} ({type(child).__name__}) is neither embedding, block nor final norm")
    if len(norms) != 1:
        raise _unknown(model, f"it has {len(norms)} norms after the blocks, expected 1")
    _refuse_factors(model)
    head_name, embedding_name = names[id(head)], names[id(embedding)]
    tied = ((f"{embedding_name}.weight", f"{head_name}.weight"),) if head.weight is embedding.weight else ()
    return Anatomy(stack_name, (embedding_name, *positions), (*norms, head_name), head_name, tied)


class HuggingFaceStage:
    """`run_stage` of a split Hugging Face decoder."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, split: Split) -> None:
        trunk_name = anatomy.blocks.rpartition(".")[0]
        trunk = model.get_submodule(trunk_name)
        self.trunk = trunk
        self.embedding_name = anatomy.before[0]
        self.model = model
        self._part: Part | None = None
        for name in anatomy.before[1:]:
            _stand_in(model, name, _Nothing())
            _gate(model.get_submodule(name), self._is_first, lambda *_, **__: torch.zeros(()))
        _stand_in(model, anatomy.after[0], nn.Identity())
        _gate(model.get_submodule(anatomy.after[0]), self._is_last, _same)
        for child in trunk.children():
            if isinstance(child, nn.Dropout):  # it drops out the embedding, once
                _gate(child, self._is_first, _same)

    def _is_first(self) -> bool:
        return self._part is None or self._part.is_first

    def _is_last(self) -> bool:
        return self._part is None or self._part.is_last

    def __call__(self, x: Tensor | None, batch: Mapping[str, Tensor], part: Part) -> Tensor:
        """The output of one part, [B, T, D]: after the final norm for the last.

        Args:
            x: what the part before put out; None for the first.
            batch: `input_ids` [B, T], and `attention_mask` [B, T], `position_ids` [B, T] where there are any.

        Raises:
            ConfigError: the batch has `document_ids`, which Hugging Face models do not know.
        """
        if batch.get("document_ids") is not None:
            raise ConfigError(
                "this batch has document_ids, which Hugging Face models do not take",
                hint="pack rows with position_ids that start over in each document, or use a native family",
            )
        if part.is_first:
            x = self.model.get_submodule(self.embedding_name)(batch["input_ids"])
        named = {name: batch[name] for name in ("attention_mask", "position_ids") if batch.get(name) is not None}
        stack = next(child for child in self.trunk.children() if isinstance(child, StageLayers))
        with self._running(part), stack.only(part.blocks):
            output: Tensor = self.trunk(inputs_embeds=x, use_cache=False, **named).last_hidden_state
        return output

    @contextlib.contextmanager
    def _running(self, part: Part) -> Iterator[None]:
        """Inside, norm and positions are those of this part, and the kinds of layers those of its blocks."""
        config: Any = self.trunk.config
        kinds = getattr(config, "layer_types", None)
        self._part = part
        if kinds is not None:  # trunks ask for the kind of their i-th block
            config.layer_types = [kinds[number] for number in part.blocks]
        try:
            yield
        finally:
            self._part = None
            if kinds is not None:
                config.layer_types = kinds


class _Nothing(nn.Module):
    """In the place of an embedding that another part adds: adds nothing, in whatever type."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


def _same(x: Tensor) -> Tensor:
    return x


def _stand_in(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module without parameters where the split left None, because the trunk calls it."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if getattr(owner, leaf) is None:
        setattr(owner, leaf, module)


def _gate(module: nn.Module, is_on: Callable[[], bool], otherwise: Callable[..., Any]) -> None:
    """Let a module compute only in the parts in which it belongs."""
    of_instance = module.__dict__.get("forward")

    def gated(*inputs: Any, **named: Any) -> Any:
        if not is_on():
            return otherwise(*inputs, **named)
        # Of the class that it has by now: tensor parallelism gives modules another one.
        forward = of_instance or type(module).forward.__get__(module)
        return forward(*inputs, **named)

    module.forward = gated


def _embeddings(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    of: Any = model
    if not (hasattr(of, "get_input_embeddings") and hasattr(of, "get_output_embeddings")):
        raise _unknown(model, "it does not say what its embeddings are (get_input_embeddings, get_output_embeddings)")
    embedding, head = of.get_input_embeddings(), of.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _unknown(model, f"its embedding is {type(embedding).__name__} and its head {type(head).__name__}")
    return embedding, head


def _refuse_factors(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if str(getattr(config, "model_type", "")).startswith("gemma"):
        raise _unknown(model, "gemma models multiply their embedding inside the trunk")
    for name in _SCALED:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise _unknown(model, f"its {name} is {value}")


def _unknown(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} cannot be split over a pipeline: {why}",
        hint="a trunk of token (and position) embeddings, one list of blocks and a final norm can; or use "
        "parallel.pipeline.stages=1",
    )
