"""Tensor parallelism of Hugging Face models by the plan they carry (`_tp_plan`): patterns of module names and styles.

Their own code runs between the linears and expects all tokens, so the residual stream stays whole: sums over ranks take
the place of gathers and scatters, and norms are computed on every rank alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models.adapters.linear import AdaptedLinear
from trainwright.parallel.tensor.modules import make_column, make_row, make_vocabulary, make_whole
from trainwright.parallel.tensor.parameters import Divider
from trainwright.parallel.tensor.stream import Stream

__all__ = ["apply_tensor_plan", "plan_problems", "tensor_plan_of"]

Apply = Callable[[nn.Module, Divider, Stream], None]

_COLUMN: dict[str, Apply] = {
    "colwise": lambda module, divider, stream: make_column(module, divider, stream, enters=True),
    "colwise_gather_output": lambda module, divider, stream: make_column(
        module, divider, stream, enters=True, joins=True
    ),
}
_ROW: dict[str, Apply] = {
    "rowwise": make_row,
    "rowwise_split_input": lambda module, divider, stream: make_row(module, divider, stream, splits=True),
}
_OTHER: dict[str, Apply] = {
    "embedding_rowwise": make_vocabulary,
    # Norms of queries and keys: each rank sees its own heads, and so an addend of the gradient.
    "replicated_with_grad_allreduce": lambda module, divider, stream: make_whole(module, divider, adds=True),
    "replicate": lambda module, divider, stream: make_whole(module, divider, adds=False),
}
# Names of transformers 4 for the same, and norms that may work on parts of the tokens, but need not.
_ALIASES = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "sequence_parallel": "replicate",
}

_WHOLE = ("replicated_with_grad_allreduce", "replicate")
_KNOWN_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, AdaptedLinear.forward)

_STYLES = {**_COLUMN, **_ROW, **_OTHER}


def tensor_plan_of(model: nn.Module) -> dict[str, str]:
    """Module name -> style for each module that the model's own plan names, in order of definition.

    Raises:
        ModelError: the model has no plan.
    """
    patterns: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    if not patterns:
        raise ModelError(
            f"{type(model).__name__} has no tensor-parallel plan (`_tp_plan`), so how to divide it is not known",
            hint="set parallel.tensor=1 (ZeRO divides any model), use a family of this project, or give the model a"
            " plan: config.base_model_tp_plan = {'layers.*.attn.q': 'colwise', ...}",
        )
    compiled = [(re.compile(re.escape(p).replace(r"\*", r"[^.]+")), style) for p, style in patterns.items()]
    found = {}
    for name, _ in model.named_modules():
        style = next((style for pattern, style in compiled if pattern.fullmatch(name)), None)
        if style is not None:
            found[name] = _ALIASES.get(style, style)
    return found


def plan_problems(model: nn.Module, degree: int) -> list[str]:
    """Every reason why a model with a plan cannot be divided over `degree` ranks; empty where it can."""
    plan = tensor_plan_of(model)
    modules = dict(model.named_modules())
    _add_tied_embeddings(plan, modules)
    problems = []
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if unknown:
        problems.append(f"its plan has styles that are not supported: {', '.join(unknown)}")
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    # A plan that joins the features again, because the code slices them, leaves the heads whole.
    heads_divided = any(style == "colwise" and "att" in name for name, style in plan.items())
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if heads_divided and isinstance(heads, int) and heads % degree:
            problems.append(f"parallel.tensor {degree} does not divide {name} {heads}")
    sizes: dict[str, int] = {}
    for name, style in plan.items():
        module = modules[name]
        kind = nn.Embedding if style == "embedding_rowwise" else nn.Linear
        if (style in _COLUMN or style in _ROW or style == "embedding_rowwise") and not isinstance(module, kind):
            problems.append(f"{name} is a {type(module).__name__}, and {style} needs a {kind.__name__}")
        elif style not in _WHOLE and type(module).forward not in _KNOWN_FORWARDS:
            # Its class is exchanged, and what its own code adds (Gemma's factor on the embedding) would be lost.
            problems.append(f"{name} is a {type(module).__name__}, whose own code is not that of a {kind.__name__}")
        elif style == "colwise":
            sizes[f"the {module.out_features} output features of {_generic(name)}"] = int(module.out_features)
        elif style in _ROW:
            sizes[f"the {module.in_features} input features of {_generic(name)}"] = int(module.in_features)
    problems += [f"parallel.tensor {degree} does not divide {what}" for what, size in sizes.items() if size % degree]
    return problems


def _generic(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def apply_tensor_plan(model: nn.Module, axis: Axis) -> nn.Module:
    """Divide a Hugging Face model as its own plan says, in place; returns it.

    Raises:
        ModelError: it has no plan. ConfigError: it cannot be divided over the ranks; every reason is named.
    """
    plan = tensor_plan_of(model)
    problems = plan_problems(model, axis.size)
    if problems:
        raise ConfigError(
            f"{type(model).__name__} cannot be divided over {axis.size} ranks: " + "; ".join(dict.fromkeys(problems)),
            hint="choose parallel.tensor among the common divisors of its heads and widths, or 1",
        )
    stream, divider = Stream(axis, always_whole=True), Divider(axis)
    modules = dict(model.named_modules())
    _add_tied_embeddings(plan, modules)
    for name, style in plan.items():
        _STYLES[style](modules[name], divider, stream)
    for module in model.modules():
        if any(not divider.is_made(p) for p in module._parameters.values() if p is not None):
            make_whole(module, divider, adds=False)
    return model


def _add_tied_embeddings(plan: dict[str, str], modules: dict[str, nn.Module]) -> None:
    """An embedding that shares its weight with a divided head is divided with it."""
    divided = {id(modules[name]._parameters["weight"]) for name, style in plan.items() if style in _COLUMN}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and id(module.weight) in divided:
            plan[name] = "embedding_rowwise"
