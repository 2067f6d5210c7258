"""One optimizer object for any mix of algorithms, with state that is named, exact and free of pickle.

An algorithm is two functions (make the state of one parameter; update a list of parameters); the class below does what
all share: groups, this rank's part of sharded parameters, fp32 weights for half-precision ones, the gradient factor,
and the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.protocols import StateDict
from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.halves import HALVES, follow_weights, initial_state, open_weights, write_back
from trainwright.optim.shard import local_gradient, local_part, shard_of
from trainwright.optim.state import loadable, present, refuse_other_names, settings_of

__all__ = ["GroupedOptimizer"]

BATCH_ELEMENTS = {"cpu": 1 << 20}
LARGEST_BATCH = 1 << 26
"""Numbers of this rank that are updated together where an update makes temporary copies (fp32 gradients and weights):
on CPUs few enough to stay in the cache."""


class GroupedOptimizer(torch.optim.Optimizer):
    """Runs each parameter group with the algorithm its `algorithm` key names.

    Parameters are plain tensors or DTensors divided in any way (`shard.Shard`); updates run on this rank's part. State
    is keyed by parameter name, so it loads whatever the order of parameters or groups.
    Made by `build_optimizer`; each group's `params` must be (name, tensor) pairs.

    Attributes:
        steps: how many steps were taken, over the whole life of the state.
    """

    def __init__(self, groups: list[Group], algorithms: dict[str, Algorithm], defaults: dict[str, Any]) -> None:
        self.algorithms = algorithms
        self.steps = 0
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("half_update", "master")
            group.setdefault("rounding_seed", 0)
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                self._refuse_placement(name, parameter, group)

    def _refuse_placement(self, name: str, parameter: Tensor, group: Group) -> None:
        """ConfigError for a parameter that is divided in a way which its algorithm cannot update."""
        shard = shard_of(parameter)
        reason = None if shard is None else self.algorithms[group["algorithm"]].refuses(shard)
        if reason is not None:
            raise ConfigError(
                f"optimizer {group['algorithm']} cannot update {name}: {reason}",
                hint="use adamw, or a layout that divides this parameter in another way",
            )

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
        self.begin_step()
        for group in self.param_groups:
            self._step_group(group, None, gradient_factor)
        return loss

    def begin_step(self) -> None:
        """Count a step whose parameters will be updated piece by piece, by `step_part`."""
        self.steps += 1

    @torch.no_grad()
    def step_part(self, parameters: Collection[Tensor], gradient_factor: float | Tensor | None = None) -> None:
        """Update some of the parameters, bitwise as `step` would, which is all of them at once.

        For updates during the backward pass, or with state that is in memory only for a while. `begin_step` goes first,
        once for all parts. All ranks must give the same parts in the same order where an algorithm looks at whole
        matrices (muon, adafactor) of sharded parameters.
        """
        wanted = {id(parameter) for parameter in parameters}
        for group in self.param_groups:
            self._step_group(group, wanted, gradient_factor)

    def set_lr(self, multiplier: float) -> None:
        """Set every group's learning rate to its own peak times `multiplier` (a schedule's value)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def _step_group(self, group: Group, wanted: set[int] | None, gradient_factor: float | Tensor | None) -> None:
        algorithm = self.algorithms[group["algorithm"]]
        trained = [
            (name, p)
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if (wanted is None or id(p) in wanted)
            and (p.grad is not None or (algorithm.whole and shard_of(p) is not None))
        ]
        if not trained:
            return
        grads = [local_gradient(p) for _, p in trained]
        factor = None
        if gradient_factor is not None:
            device = local_part(trained[0][1]).device
            factor = torch.as_tensor(gradient_factor, dtype=torch.float32, device=device)
            if not algorithm.folds_factor(group, device):
                if present_grads := [grad for grad in grads if grad is not None]:
                    torch._foreach_mul_(present_grads, factor)
                factor = None
        for start, stop in _batches([p for _, p in trained], algorithm):
            self._step_batch(group, trained[start:stop], grads[start:stop], factor)

    def _step_batch(
        self, group: Group, named: list[tuple[str, Tensor]], grads: list[Tensor | None], factor: Tensor | None
    ) -> None:
        algorithm = self.algorithms[group["algorithm"]]
        items = []
        halves: list[tuple[str, Tensor, Item]] = []
        for (name, parameter), grad in zip(named, grads, strict=True):
            local = local_part(parameter)
            state = self._state_of(parameter, local, group, algorithm) if grad is not None else self.state[parameter]
            weights = open_weights(local, state)
            item = Item(weights, None if grad is None else grad.to(weights.dtype), state, shard_of(parameter))
            items.append(item)
            if weights is not local and grad is not None:
                halves.append((name, local, item))
        algorithm.update(group, items, factor)
        write_back(halves, step=self.steps, seed=group["rounding_seed"])

    # -- state ---------------------------------------------------------------------------------------------------------

    def _state_of(self, parameter: Tensor, local: Tensor, group: Group, algorithm: Algorithm) -> ParameterState:
        state: ParameterState = self.state[parameter]
        if not state:
            state.update(initial_state(local, group, algorithm))
        return state

    @torch.no_grad()
    def materialise_state(self) -> None:
        """Make the state of every parameter now, as the first update would.

        An fp32 copy of half-precision parameters is made from the values that they have now: load weights before, or
        call `weights_changed` after.
        """
        for group, _, parameter in self._named():
            self._state_of(parameter, local_part(parameter), group, self.algorithms[group["algorithm"]])

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Tell that parameters were loaded without this optimizer's state: copies of them in the state follow."""
        for _, _, parameter in self._named():
            follow_weights(local_part(parameter), self.state.get(parameter, {}))

    def state_dict(self) -> StateDict:
        """`{"parameters": {name: {key: tensor}}, "settings": {name: {"algorithm", "lr"}}, "steps"}`.

        Nothing is copied. State of divided parameters is a DTensor of the same placement (no communication), all other
        is plain and equal on all ranks. Every trained parameter has its state there, made now where it never had a
        gradient: the form of the dict depends on the model and the options only. What belongs to a parameter stands
        under its name, so that the states of ranks with different parameters (pipeline stages) join to that of all.
        """
        self.materialise_state()
        parameters: StateDict = {}
        settings: StateDict = {}
        for group, name, parameter in self._named():
            algorithm = self.algorithms[group["algorithm"]]
            parameters[name] = present(self.state[parameter], shard_of(parameter), algorithm)
            settings[name] = {"algorithm": group["algorithm"], "lr": float(group["lr"])}
        return {"parameters": parameters, "settings": settings, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Continue from a `state_dict`: tensors are copied, and learning rates taken over until the next `set_lr`.

        Tensors are DTensors of this optimizer's placements, or plain and whole. All other options (decay, betas) stay
        as this optimizer was built with. Raises CheckpointError, before anything is changed, when the parameters,
        their shapes, types or algorithms differ.
        """
        mine = {name for _, name, _ in self._named()}
        settings = settings_of(state, mine)
        refuse_other_names(set(settings), mine)
        loaded: dict[str, ParameterState] = {}
        for group, name, parameter in self._named():
            made_by = settings[name]["algorithm"]
            if made_by != group["algorithm"]:
                raise CheckpointError(
                    f"optimizer state of {name} was made by {made_by}, this run uses {group['algorithm']}",
                    hint="keep optim.name of the saved run, or start from its weights only",
                )
            saved = state["parameters"].get(name)
            if saved:
                # On the meta device: what is expected, without the memory.
                expected = initial_state(
                    torch.empty_like(local_part(parameter), device="meta"), group, self.algorithms[group["algorithm"]]
                )
                algorithm = self.algorithms[group["algorithm"]]
                loaded[name] = loadable(name, saved, expected, shard_of(parameter), algorithm)
        for group, name, parameter in self._named():
            if name not in loaded:  # never updated, by a version that then saved nothing
                self.state.pop(parameter, None)
                continue
            own = self._state_of(parameter, local_part(parameter), group, self.algorithms[group["algorithm"]])
            for key, tensor in loaded[name].items():
                own[key].copy_(tensor)
        for group in self.param_groups:
            for name in group["param_names"][:1]:  # a stage of a pipeline may train nothing
                group["lr"] = settings[name]["lr"]
        self.steps = int(state.get("steps", 0))

    def _named(self) -> Iterator[tuple[Group, str, Tensor]]:
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield group, name, parameter


def _batches(parameters: list[Tensor], algorithm: Algorithm) -> Iterator[tuple[int, int]]:
    """Ranges of parameters to update together: all, unless that would make large temporary copies.

    Sizes of whole parameters decide, so that all ranks cut at the same places.
    """
    if not algorithm.whole and all(p.dtype not in HALVES for p in parameters):
        yield 0, len(parameters)
        return
    most = BATCH_ELEMENTS.get(parameters[0].device.type, LARGEST_BATCH)
    start = elements = 0
    for i, parameter in enumerate(parameters):
        shard = shard_of(parameter)
        size = parameter.numel() // (1 if shard is None else shard.parts)
        if i > start and elements + size > most:
            yield start, i
            start, elements = i, 0
        elements += size
    yield start, len(parameters)
