"""Which parameter gets which learning rate, weight decay and algorithm: ordered rules over names, first match wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.optim.options import OptimizerOptions, Rule
from trainwright.optim.parts import ModelParts

__all__ = ["NOTHING_TO_TRAIN", "GroupSummary", "describe_groups", "first_match", "freeze", "make_groups"]

NOTHING_TO_TRAIN = "there is no parameter to train: every one is frozen"
UNFREEZE = "remove a freeze rule or unfreeze the model"


@dataclass(frozen=True)
class GroupSummary:
    """One parameter group as people read it. `elements` counts numbers, `tensors` counts parameters."""

    algorithm: str
    lr: float
    weight_decay: float
    tensors: int
    elements: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return (
            f"{self.algorithm}: {self.elements:,} parameters in {self.tensors} tensors, lr {self.lr:g}, "
            f"weight decay {self.weight_decay:g} ({shown})"
        )


def first_match(rules: Sequence[Rule], name: str, parts: ModelParts | None = None) -> Rule | None:
    """The first rule for `name`, or None; `parts` are those of its model, for rules that speak of parts."""
    parts = parts or ModelParts([name])
    return next((rule for rule in rules if _is_for(rule, name, parts)), None)


def _is_for(rule: Rule, name: str, parts: ModelParts) -> bool:
    if rule.part is not None:
        return parts.holds(rule.part, name)
    return rule.pattern is not None and re.search(rule.pattern, name) is not None


def freeze(named_parameters: Iterable[tuple[str, Tensor]], options: OptimizerOptions) -> None:
    """Take `requires_grad` from parameters of a whole model that `options` freezes, by any name of a tied one.

    Before a model is divided, so that whoever divides it knows what has gradients.

    Raises:
        ConfigError: a rule or a part is for nothing, or nothing is left to train.
    """
    names_of = _names_of(named_parameters)
    parts = ModelParts(name for names in names_of.values() for name in names)
    _refuse_idle(options, parts)
    _freeze(names_of, options, parts)
    if not any(parameter.requires_grad for parameter in names_of):
        raise ConfigError(NOTHING_TO_TRAIN, hint=UNFREEZE)


def _names_of(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, list[str]]:
    found: dict[Tensor, list[str]] = {}
    for name, parameter in named_parameters:
        found.setdefault(parameter, []).append(name)
    return found


def _rule_of(names: Sequence[str], options: OptimizerOptions, parts: ModelParts) -> Rule | None:
    """The rule of a parameter with these names."""
    return next((found for name in names if (found := first_match(options.rules, name, parts))), None)


def _freeze(names_of: Mapping[Tensor, list[str]], options: OptimizerOptions, parts: ModelParts) -> None:
    for parameter, names in names_of.items():
        rule = _rule_of(names, options, parts)
        by_part = any(parts.holds(part, name) for part in options.freeze for name in names)
        if by_part or (rule is not None and rule.freeze):
            parameter.requires_grad_(False)


def make_groups(
    named_parameters: Iterable[tuple[str, Tensor]], options: OptimizerOptions, *, elsewhere: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, in order of first appearance; tied parameters count once, by the first name.

    A rule may be for names `elsewhere`: parameters of the same model that other processes hold.
    Parameters of frozen rules get `requires_grad = False` and, like those already without gradient, no group.
    Where others hold parts of the model and nothing here is trained, there is one group without parameters: the engine
    sees to it that somebody trains something.
    Raises ConfigError when a rule matches no name (naming near ones) or when nothing is left to train.
    """
    names_of = _names_of(named_parameters)
    # A rule may speak of a tied parameter by any of its names.
    here = [name for names in names_of.values() for name in names]
    parts = ModelParts([*here, *elsewhere])
    _refuse_idle(options, parts)
    _freeze(names_of, options, parts)

    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for parameter, names in names_of.items():
        if not parameter.requires_grad:
            continue
        rule = _rule_of(names, options, parts)
        lr_scale = rule.lr_scale if rule is not None and rule.lr_scale is not None else 1.0
        if options.layer_decay != 1.0:
            lr_scale *= options.layer_decay ** parts.depth(names)
        decay = rule.weight_decay if rule is not None and rule.weight_decay is not None else None
        if decay is None:
            decay = options.weight_decay if _decays(parameter, names, options) else 0.0
        algorithm = _algorithm_for(parameter, names, options)
        group = groups.setdefault(
            (algorithm, lr_scale, decay),
            {"params": [], "algorithm": algorithm, "lr": options.lr * lr_scale, "weight_decay": decay},
        )
        group["params"].append((names[0], parameter))
    if not groups:
        if set(parts.names) == set(here):
            raise ConfigError(NOTHING_TO_TRAIN, hint=UNFREEZE)
        return [_empty_group(options)]
    # The highest rate first: it is the one that reports name.
    return sorted(groups.values(), key=lambda group: -group["lr"]) if options.layer_decay != 1.0 else [*groups.values()]


def _empty_group(options: OptimizerOptions) -> dict[str, Any]:
    """The group of a process that holds frozen parameters only, of a model that others train: it has a rate to report,
    and takes part in every step."""
    algorithm = "adamw" if options.name == "muon" else options.name
    return {
        "params": [],
        "param_names": [],
        "algorithm": algorithm,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
    }


def describe_groups(optimizer: torch.optim.Optimizer) -> list[GroupSummary]:
    """What each parameter group of an optimizer of `build_optimizer` holds, for printing."""
    return [
        GroupSummary(
            algorithm=group["algorithm"],
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            tensors=len(group["params"]),
            elements=sum(parameter.numel() for parameter in group["params"]),
            names=tuple(group["param_names"]),
        )
        for group in optimizer.param_groups
    ]


def _decays(parameter: Tensor, names: Sequence[str], options: OptimizerOptions) -> bool:
    # Norm weights and biases are vectors; pulling them or an embedding row towards zero has no use (as nanoGPT).
    return parameter.ndim > 1 and not _any_match(options.no_decay, names)


def _algorithm_for(parameter: Tensor, names: Sequence[str], options: OptimizerOptions) -> str:
    if options.name != "muon":
        return options.name
    is_hidden_matrix = parameter.ndim in (2, 3) and not _any_match(options.adamw_only, names)
    return "muon" if is_hidden_matrix else "adamw"


def _any_match(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _refuse_idle(options: OptimizerOptions, parts: ModelParts) -> None:
    """Refuse what is said of parameters that the model does not have."""
    for part in [*options.freeze, *(rule.part for rule in options.rules if rule.part is not None)]:
        parts.check(part)
    if options.layer_decay != 1.0 and not parts.layers:
        raise ConfigError(
            "optim.layer_decay needs layers that are numbered in the names of parameters, and there are none",
            hint=f"names are such as {', '.join(parts.names[:3])}; use optim.rules with lr_scale",
        )
    names = parts.names
    patterns = [rule.pattern for rule in options.rules if rule.pattern is not None]
    idle = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if not idle:
        return
    near: list[str] = []
    for pattern in idle:
        plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern)
        tails = {part: name for name in names for part in (name, *_suffixes(name))}
        close = difflib.get_close_matches(plain, list(tails), n=3, cutoff=0.5)
        near += [tails[part] for part in close]
    shown = list(dict.fromkeys(near)) or list(names[:3])
    raise ConfigError(
        f"optimizer rule {', '.join(map(repr, idle))} matches none of the {len(names)} parameter names",
        hint=f"near names: {', '.join(shown)}",
    )


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:stop]) for start in range(len(parts)) for stop in range(start + 1, len(parts) + 1)]
