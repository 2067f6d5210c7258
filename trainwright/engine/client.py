"""A client's own torch optimizer and learning-rate scheduler, as the engine uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.protocols import StateDict
from trainwright.parallel.pipeline import alias_parameters

__all__ = ["ClientOptimizer", "names_of", "point_at"]


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """The name of every parameter in the whole model; a tied one has its first."""
    aliases = alias_parameters(model)
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, aliases.get(name, name))
    return names


def point_at(optimizer: torch.optim.Optimizer, before: Mapping[Tensor, str], model: nn.Module) -> None:
    """Let an optimizer that was made over the parameters `before` a model was divided train those it has now.

    Those that other stages of a pipeline have are left out.

    Raises:
        ConfigError: it holds parameters that are not the model's, or state from steps that it took already.
    """
    if optimizer.state:
        raise ConfigError(
            "the optimizer has taken steps already, and its state cannot be divided afterwards",
            hint="pass a fresh one, or a callable that makes it: optimizer=lambda parameters: AdamW(parameters)",
        )
    now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    now |= {name: parameter for parameter, name in names_of(model).items()}
    for group in optimizer.param_groups:
        strange = [p for p in group["params"] if p not in before]
        if strange:
            raise ConfigError(
                f"the optimizer holds {len(strange)} parameters that are not the model's"
                f" (the first has shape {list(strange[0].shape)})",
                hint="make it over model.parameters() of the model that you pass",
            )
        group["params"] = [now[before[p]] for p in group["params"] if before[p] in now]


class ClientOptimizer:
    """Any `torch.optim.Optimizer` with the engine's gradient factor, and state by parameter name.

    Args:
        scheduled: the engine multiplies the groups' rates by its schedule; else they are the client's alone.
        lr: peak learning rate of all groups where the engine schedules; None takes what each group has.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, *, scheduled: bool = False, lr: float | None = None
    ) -> None:
        self.optimizer = optimizer
        self._names = names_of(model)
        self._peaks = [float(group["lr"]) if lr is None else lr for group in self.param_groups] if scheduled else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, closure: None = None, *, gradient_factor: float | Tensor | None = None) -> Any:
        """Multiply the gradients and step."""
        if gradient_factor is not None:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            _local(parameter.grad).mul_(gradient_factor)
        return self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr(self, multiplier: float) -> None:
        """The peak rates times `multiplier`, where the engine schedules them."""
        if self._peaks is not None:
            for group, peak in zip(self.param_groups, self._peaks, strict=True):
                group["lr"] = peak * multiplier

    def materialise_state(self) -> None:
        """Make the state that the first step would make, so that a saved one has something to be loaded into.

        A step with zero gradients and zero rates; what it counts is replaced by the load that follows.
        """
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> StateDict:
        """`{"parameters": {name: state}, "settings": {name: options of its group}}`; tensors are not copied.

        What belongs to a parameter stands under its name, so that states of pipeline stages join to that of all.
        """
        state = self.optimizer.state_dict()
        order = [p for group in self.param_groups for p in group["params"]]
        parameters = {self._names[order[int(index)]]: dict(entries) for index, entries in state["state"].items()}
        settings: StateDict = {}
        for saved, group in zip(state["param_groups"], self.param_groups, strict=True):
            options = {key: value for key, value in saved.items() if key != "params" and _is_plain(value)}
            settings |= {self._names[p]: dict(options) for p in group["params"]}
        return {"parameters": parameters, "settings": settings}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of `state_dict`; raises CheckpointError when the groups hold other parameters."""
        mine = [[self._names[p] for p in group["params"]] for group in self.param_groups]
        settings = _settings(state)
        known = {name for names in mine for name in names}
        mixed = [names for names in mine if any(settings.get(name) != settings.get(names[0]) for name in names)]
        if set(settings) != known or mixed:
            raise CheckpointError(
                f"optimizer state is of {len(settings)} parameters, this optimizer of {len(known)} in groups of"
                f" {[len(names) for names in mine]}, or they are under other names or in other groups",
                hint="make the optimizer over the same parameter groups as when it was saved",
            )
        current = self.optimizer.state_dict()
        index_of = {name: index for index, name in enumerate(name for names in mine for name in names)}
        groups = [
            {**fresh, **(settings[names[0]] if names else {})}
            for fresh, names in zip(current["param_groups"], mine, strict=True)
        ]
        entries = {index_of[name]: dict(values) for name, values in state["parameters"].items()}
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _settings(state: StateDict) -> dict[str, dict[str, Any]]:
    """Options by parameter; versions before pipelines saved groups with the names of their parameters."""
    if "groups" not in state:
        return dict(state["settings"])
    return {
        name: {key: value for key, value in group.items() if key != "names"}
        for group in state["groups"]
        for name in group["names"]
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
