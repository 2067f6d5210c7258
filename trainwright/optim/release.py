"""Steps each parameter as soon as its gradient is complete in the backward pass, and frees the gradient at once.

At no time are there gradients of more than a few parameters: 4 bytes a parameter less (LOMO, 2306.09782, with any
elementwise optimizer). What it costs is all that needs every gradient before the first update: clipping by the global
norm, leaving a step out after looking at it, and loss scaling that skips overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.optim.clip import squared_norm_sum
from trainwright.optim.optimizer import GroupedOptimizer
from trainwright.optim.shard import local_part, shard_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["StepInBackward"]


class StepInBackward:
    """Makes an optimizer update during the backward pass between `arm` and `finish`; bitwise equal to `step` after it.

        stepping = StepInBackward(optimizer)
        stepping.arm(gradient_factor=1 / tokens)
        loss_sum.backward()
        stepping.finish()

    Gradients of earlier micro-batches may be there when it is armed; the backward pass that follows must be the last
    of the step. Works for plain parameters and for those that FSDP2 sharded (it calls the hooks after its
    reduce-scatter). Not for gradients that something else reduces later, such as data parallelism without sharding.

    Args:
        optimizer: every algorithm must look at one parameter at a time.
        clip_norm: what the run clips gradients to; anything but None is refused.
        holders: see `clip.squared_norm_sum`; None counts every parameter once.

    Attributes:
        squared_norm: `clip.squared_norm_sum` of the last step's gradients before `gradient_factor`: an fp64 scalar;
            complete after `finish`.

    Raises:
        ConfigError: clipping, or an algorithm that needs whole matrices of sharded parameters.
    """

    def __init__(
        self,
        optimizer: GroupedOptimizer,
        *,
        clip_norm: float | None = None,
        holders: Callable[[Tensor], int] | None = None,
    ) -> None:
        if clip_norm is not None:
            raise ConfigError(
                f"gradients cannot be clipped to {clip_norm:g} when they are released in the backward pass: the norm "
                "is known only after the last of them",
                hint="set optim.clip_norm to null, or memory.release_gradients to false",
            )
        for group in optimizer.param_groups:
            whole = optimizer.algorithms[group["algorithm"]].whole
            if whole and any(shard_of(parameter) is not None for parameter in group["params"]):
                raise ConfigError(
                    f"optimizer {group['algorithm']} looks at whole matrices, so it cannot update sharded parameters "
                    "in the backward pass",
                    hint="use adamw, sgd or lion, or set memory.release_gradients to false",
                )
        self.optimizer = optimizer
        self.squared_norm = squared_norm_sum([], _one)
        self.holders = holders or _one
        self._factor: float | Tensor | None = None
        self._armed = False
        self._handles: list[RemovableHandle] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook))

    def arm(self, gradient_factor: float | Tensor | None = None) -> None:
        """Begin a step: from now on every gradient that is complete updates its parameter.

        Args:
            gradient_factor: as in `GroupedOptimizer.step`; it must be known before the backward pass.
        """
        if self._armed:
            raise RuntimeError("the step before was not finished: call finish() after its backward pass")
        self.optimizer.begin_step()
        self._factor = gradient_factor
        first = local_part(self.optimizer.param_groups[0]["params"][0]).detach()
        self.squared_norm = squared_norm_sum([first], _one)  # zero on the right device: no parameter, no gradient
        self._armed = True

    def finish(self) -> None:
        """End the step: update what has a gradient that no backward pass touched since `arm` (an earlier one did)."""
        if not self._armed:
            raise RuntimeError("there is no step to finish: call arm() before the backward pass")
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._release(parameter)
        self._armed = False
        self._factor = None

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradients before `gradient_factor`, of this rank's part where they are divided."""
        return self.squared_norm.sqrt().float()

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, parameter: Tensor) -> None:
        if self._armed:
            self._release(parameter)

    @torch.no_grad()
    def _release(self, parameter: Tensor) -> None:
        self.squared_norm.add_(squared_norm_sum([parameter], self.holders).to(self.squared_norm.device))
        self.optimizer.step_part([parameter], self._factor)
        parameter.grad = None


def _one(parameter: Tensor) -> int:
    return 1
