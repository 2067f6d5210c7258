"""One optimizer object for any mix of algorithms, with state that is named, exact and free of pickle.

An algorithm is two pure functions (make the state of one parameter; update a list of parameters); the class below does
what all share: groups, fp32 master copies of half-precision parameters, the gradient factor, and the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.base.errors import CheckpointError
from trainwright.base.protocols import StateDict

__all__ = ["Algorithm", "GroupedOptimizer"]

Group = dict[str, Any]
ParameterState = dict[str, Tensor]

MASTER = "master"
"""State key of the fp32 copy of a half-precision parameter: updates below bf16's spacing (1/256) add up there."""


class Update(Protocol):
    """Updates `params` in place from `grads` and `states`, all fp32 or wider (or as the user made them)."""

    def __call__(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[ParameterState],
        gradient_factor: Tensor | None,
    ) -> None: ...


@dataclass(frozen=True)
class Algorithm:
    """How one kind of optimizer makes and uses the state of a parameter.

    Args:
        init: (parameter, group) -> state tensors, zero at the start.
        update: see `Update`.
        folds_factor: (group, device) -> whether `update` itself multiplies gradients by `gradient_factor`
            (saving a pass over memory); otherwise it always gets None.
    """

    init: Callable[[Tensor, Group], ParameterState]
    update: Update
    folds_factor: Callable[[Group, torch.device], bool] = lambda group, device: False


class GroupedOptimizer(torch.optim.Optimizer):
    """Runs each parameter group with the algorithm its `algorithm` key names.

    State is keyed by parameter name, so it loads whatever the order of parameters or groups.
    Made by `build_optimizer`; each group's `params` must be (name, tensor) pairs.
    """

    def __init__(self, groups: list[Group], algorithms: dict[str, Algorithm], defaults: dict[str, Any]) -> None:
        self.algorithms = algorithms
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_factor: float | Tensor | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value.

        Args:
            gradient_factor: the update uses gradients times this number (see `clip.clip_factor`). Where the kernel can
                fold it in, that saves a pass over all gradients. The gradients themselves are left scaled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, gradient_factor)
        return loss

    def set_lr(self, multiplier: float) -> None:
        """Set every group's learning rate to its own peak times `multiplier` (a schedule's value)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def _step_group(self, group: Group, gradient_factor: float | Tensor | None) -> None:
        algorithm = self.algorithms[group["algorithm"]]
        trained = [p for p in group["params"] if p.grad is not None]
        if not trained:
            return
        device = trained[0].device
        factor = None
        if gradient_factor is not None:
            factor = torch.as_tensor(gradient_factor, dtype=torch.float32, device=device)
            if not algorithm.folds_factor(group, device):
                torch._foreach_mul_([p.grad for p in trained], factor)
                factor = None
        states = [self._state_of(p, group, algorithm) for p in trained]
        targets = [state.get(MASTER, p) for p, state in zip(trained, states, strict=True)]
        grads = [p.grad.to(target.dtype) for p, target in zip(trained, targets, strict=True)]
        algorithm.update(group, targets, grads, states, factor)
        halves = [(p, target) for p, target in zip(trained, targets, strict=True) if target is not p]
        if halves:
            torch._foreach_copy_([p for p, _ in halves], [target for _, target in halves])

    def _state_of(self, parameter: Tensor, group: Group, algorithm: Algorithm) -> ParameterState:
        state: ParameterState = self.state[parameter]
        if not state:
            target = parameter.detach()
            if parameter.dtype in (torch.bfloat16, torch.float16):
                target = target.float()
                state[MASTER] = target
            state.update(algorithm.init(target, group))
        return state

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """`{"parameters": {name: {key: tensor}}, "groups": [{"algorithm", "lr", "names"}]}`; tensors are not copied."""
        parameters: StateDict = {}
        groups = []
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                parameters[name] = dict(self.state[parameter]) if parameter in self.state else {}
            groups.append(
                {"algorithm": group["algorithm"], "lr": float(group["lr"]), "names": list(group["param_names"])}
            )
        return {"parameters": parameters, "groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Continue from a `state_dict`: tensors are copied, and learning rates taken over until the next `set_lr`.

        All other options (decay, betas) stay as this optimizer was built with. Raises CheckpointError, before anything
        is changed, when the parameters, their shapes or their algorithms differ.
        """
        mine = {name: (p, group) for group in self.param_groups for name, p in _named(group)}
        algorithm_of = {name: group["algorithm"] for group in state["groups"] for name in group["names"]}
        _refuse_other_names(set(algorithm_of), set(mine))
        fresh: dict[str, ParameterState] = {}
        for name, saved in state["parameters"].items():
            parameter, group = mine[name]
            if algorithm_of[name] != group["algorithm"]:
                raise CheckpointError(
                    f"optimizer state of {name} was made by {algorithm_of[name]}, this run uses {group['algorithm']}",
                    hint="keep optim.name of the saved run, or start from its weights only",
                )
            if saved:
                fresh[name] = self._restored(name, parameter, group, saved)
        for name, (parameter, _) in mine.items():
            self.state.pop(parameter, None)
            if name in fresh:
                self.state[parameter] = fresh[name]
        lr_of = {name: group["lr"] for group in state["groups"] for name in group["names"]}
        for group in self.param_groups:
            group["lr"] = lr_of[group["param_names"][0]]

    def _restored(self, name: str, parameter: Tensor, group: Group, saved: StateDict) -> ParameterState:
        algorithm = self.algorithms[group["algorithm"]]
        target = parameter.detach()
        state: ParameterState = {}
        if parameter.dtype in (torch.bfloat16, torch.float16):
            target = target.float()
            state[MASTER] = target
        state.update(algorithm.init(target, group))
        if set(state) != set(saved):
            raise CheckpointError(
                f"optimizer state of {name} holds {sorted(saved)}, expected {sorted(state)}",
                hint="resume with the precision and optimizer options that the checkpoint was made with",
            )
        for key, tensor in state.items():
            if tensor.shape != saved[key].shape:
                found = list(saved[key].shape)
                raise CheckpointError(
                    f"optimizer state {key} of {name} has shape {found}, expected {list(tensor.shape)}",
                    hint="the checkpoint belongs to a model of another size",
                )
            tensor.copy_(saved[key])
        return state


def _named(group: Group) -> list[tuple[str, Tensor]]:
    return list(zip(group["param_names"], group["params"], strict=True))


def _refuse_other_names(saved: set[str], mine: set[str]) -> None:
    if saved == mine:
        return
    parts = []
    for what, names in (("missing from the checkpoint", mine - saved), ("not trained by this run", saved - mine)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {what} ({shown})")
    raise CheckpointError(
        f"optimizer state does not fit the model: parameters {'; '.join(parts)}",
        hint="resume with the model and freeze rules of the saved run, or start from its weights only",
    )
