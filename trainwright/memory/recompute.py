"""Activation checkpointing: a block's activations are dropped after forward and computed again in backward.

Sublinear memory cost, Chen et al., arXiv 1604.06174. The block stays the module it was: only its `forward` (and
`compile`) is taken over, so that parameter names, state dicts, hooks and `fully_shard` afterwards know of nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from trainwright.base.errors import ConfigError
from trainwright.memory.offload import ActivationOffload
from trainwright.memory.selective import selective_contexts
from trainwright.models import Backbone
from trainwright.models.dropout import pin

__all__ = ["RecomputePolicy", "apply_recompute", "read_policy", "remove_recompute"]

KINDS = ("none", "full", "selective")

# Where the Hugging Face stack hands a key-value cache to its blocks. A cache that is appended to twice (in forward and
# again in backward) is wrong, and in training it is of no use.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class RecomputePolicy:
    """kind: what a recomputed block drops. every: of `every` blocks one is recomputed, the first of each."""

    kind: Literal["none", "full", "selective"] = "none"
    every: int = 1

    def covers(self, index: int) -> bool:
        """Whether block `index` is recomputed."""
        return self.kind != "none" and index % self.every == 0

    def __str__(self) -> str:
        return self.kind if self.every == 1 else f"every {self.every}"


def read_policy(value: str | Mapping[str, int] | RecomputePolicy) -> RecomputePolicy:
    """The policy that a recipe's `memory.recompute` means: none, full, selective or {every: n}.

    Raises ConfigError for anything else ("auto" is the planner's to settle).
    """
    if isinstance(value, RecomputePolicy):
        return value
    if isinstance(value, Mapping):
        every = value.get("every")
        if set(value) == {"every"} and isinstance(every, int) and not isinstance(every, bool) and every >= 1:
            return RecomputePolicy("full", every)
    elif value == "none":
        return RecomputePolicy("none")
    elif value == "full":
        return RecomputePolicy("full")
    elif value == "selective":
        return RecomputePolicy("selective")
    raise ConfigError(f"memory.recompute is {value!r}", hint=f"use one of {', '.join(KINDS)} or {{every: n}}")


def apply_recompute(
    model: nn.Module,
    policy: str | Mapping[str, int] | RecomputePolicy,
    *,
    blocks: Sequence[nn.Module] | None = None,
    offload: ActivationOffload | None = None,
) -> nn.Module:
    """Recompute, and where asked offload, the activations of a model's repeated blocks; returns the model.

    Call it before `block.compile()` and before `fully_shard`. Losses and gradients are bitwise those of the plain
    model, random numbers included; compiled with `selective` the compiler fuses differently and they may differ by
    rounding.

    Args:
        policy: see `read_policy`.
        blocks: the modules to treat, in order; default `model.blocks` of a native decoder.
        offload: moves what the blocks still keep to host memory or to a file, whatever the policy.

    Raises:
        ConfigError: the policy is unknown, no block is known, or a block is compiled or treated already.
    """
    chosen = read_policy(policy)
    if chosen.kind == "none" and offload is None:
        return model
    if blocks is None:
        if not isinstance(model, Backbone):
            raise ConfigError(
                f"which modules of {type(model).__name__} are its repeated blocks is not known",
                hint="pass blocks=[...], for example those that find_blocks gives",
            )
        blocks = list(model.blocks.children())
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks to recompute", hint="set memory.recompute=none"
        )
    for block in blocks:
        _refuse_treated(block)
    for index, block in enumerate(blocks):
        kind = chosen.kind if chosen.covers(index) else "none"
        if kind != "none" or offload is not None:
            _Recomputed(block, kind, offload).install()
    if offload is not None:
        offload.exclude(model)
    return model


def remove_recompute(blocks: Sequence[nn.Module]) -> None:
    """Give blocks their own `forward` back; one that was compiled since then is no longer compiled."""
    for block in blocks:
        if isinstance(owner := getattr(block.__dict__.get("forward"), "__self__", None), _Recomputed):
            owner.remove()


def _refuse_treated(block: nn.Module) -> None:
    if block._compiled_call_impl is not None:
        raise ConfigError(
            f"{type(block).__name__} is compiled already: recomputing would be compiled into nothing",
            hint="call apply_recompute before block.compile()",
        )
    if isinstance(getattr(block.__dict__.get("forward"), "__self__", None), _Recomputed):
        raise ConfigError(f"{type(block).__name__} is recomputed already", hint="call remove_recompute first")


class _Recomputed:
    """Stands behind the `forward` and `compile` of one block. Not a module: it must not show in names."""

    def __init__(self, block: nn.Module, kind: str, offload: ActivationOffload | None) -> None:
        self.block = block
        self.kind = kind
        self.offload = offload
        self.own_forward: Callable[..., Any] | None = block.__dict__.get("forward")
        self.compiled: Callable[..., Any] | None = None
        names = list(inspect.signature(block.forward).parameters)
        self.cache_places = frozenset(i for i, name in enumerate(names) if name in CACHE_ARGUMENTS)

    def install(self) -> None:
        self.block.forward = self.forward
        self.block.compile = self.compile  # type: ignore[method-assign]

    def remove(self) -> None:
        del self.block.__dict__["forward"], self.block.__dict__["compile"]
        if self.own_forward is not None:
            self.block.forward = self.own_forward

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model compiles for itself.
        return {**self.__dict__, "compiled": None}

    def compile(self, *arguments: Any, **options: Any) -> None:
        """What `block.compile(...)` does now. The compiled code lies inside the checkpoint, so that recomputing runs
        the very same code again; selective recomputing works inside the compiler and is compiled whole."""
        inside = self._selective if self.kind == "selective" else self._plain
        self.compiled = torch.compile(inside, *arguments, **options)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*arguments, **options)
        if self.kind != "none":
            arguments = tuple(None if i in self.cache_places else value for i, value in enumerate(arguments))
            options = {name: None if name in CACHE_ARGUMENTS else value for name, value in options.items()}
        if self.offload is not None:
            with self.offload.block():
                return self._checkpointed(arguments, options)
        return self._checkpointed(arguments, options)

    def _checkpointed(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.kind == "none":
            return (self.compiled or self._plain)(*arguments, **options)
        if self.kind == "selective":
            return (self.compiled or self._selective)(*arguments, **options)
        inside = self._pinned(self.compiled or self._plain)
        # Only positional tensors pass the hooks that offload them, so tensors given by name travel by position.
        names = [name for name, value in options.items() if isinstance(value, Tensor)]
        rest = {name: value for name, value in options.items() if name not in names}
        count = len(arguments)

        def run(*values: Any) -> Any:
            named = dict(zip(names, values[count:], strict=True))
            return inside(*values[:count], **rest, **named)

        return checkpoint(
            run,
            *arguments,
            *(options[name] for name in names),
            use_reentrant=False,
            context_fn=noop_context_fn,
            preserve_rng_state=True,
        )

    def _selective(self, *arguments: Any, **options: Any) -> Any:
        return checkpoint(
            # The compiler saves what dropout saw like any input of the block.
            self._plain if torch.compiler.is_compiling() else self._pinned(self._plain),
            *arguments,
            use_reentrant=False,
            context_fn=selective_contexts,
            preserve_rng_state=True,
            **options,
        )

    def _pinned(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, whose dropouts see the tokens of now whenever it runs: other forward passes may begin before it is
        computed again."""
        tokens = pin(self.block)

        def pinned(*arguments: Any, **options: Any) -> Any:
            with tokens():
                return run(*arguments, **options)

        return pinned

    def _plain(self, *arguments: Any, **options: Any) -> Any:
        if self.own_forward is not None:
            return self.own_forward(*arguments, **options)
        return type(self.block).forward(self.block, *arguments, **options)
