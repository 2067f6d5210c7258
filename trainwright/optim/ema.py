"""An exponential moving average of the weights, kept beside them for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.protocols import StateDict
from trainwright.optim.shard import local_part, shard_of

__all__ = ["EMA"]


class EMA:
    """Averages parameters after each optimizer step: average <- d * average + (1 - d) * parameter.

    Args:
        named_parameters: the parameters to follow, by name; tied ones count once. Averages are fp32, on their device,
            and of divided parameters this rank's part.
        decay: d; the average looks back about 1 / (1 - d) steps.
        bias_free: the initial weights get no share: step t uses d (1 - d^t) / (1 - d^(t+1)), so that after any number
            of steps each seen weight counts d^age, as Adam's bias correction does (1412.6980, section 3).
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], *, decay: float = 0.999, bias_free: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema decay is {decay}, expected at least 0 and below 1")
        self.decay = decay
        self.bias_free = bias_free
        self.steps = 0
        first_names: dict[Tensor, str] = {}
        for name, parameter in named_parameters:
            first_names.setdefault(parameter, name)
        self._parameters = {name: parameter for parameter, name in first_names.items()}
        self.averages = {name: part.to(torch.float32, copy=True) for name, part in self._parts().items()}

    def effective_decay(self) -> float:
        """The d of the next update."""
        if not self.bias_free:
            return self.decay
        return self.decay * (1 - self.decay**self.steps) / (1 - self.decay ** (self.steps + 1))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now; call it once after each optimizer step."""
        weights = [part.float() for part in self._parts().values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.effective_decay())
        self.steps += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters hold the averages; afterwards their own bits are back, also after an error.

        Values are copied, not storages exchanged: compiled code and captured graphs keep their addresses.
        """
        own = {name: part.clone() for name, part in self._parts().items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, part in self._parts().items():
            part.copy_(values[name])

    def _parts(self) -> dict[str, Tensor]:
        # Asked for each time: FSDP exchanges the local tensors of its parameters when a module moves.
        return {name: local_part(parameter).detach() for name, parameter in self._parameters.items()}

    def state_dict(self) -> StateDict:
        """Averages of sharded parameters are DTensors of the same placement, over the same memory."""
        averages = {}
        for name, parameter in self._parameters.items():
            shard = shard_of(parameter)
            averages[name] = self.averages[name] if shard is None else shard.wrap(self.averages[name])
        return {"steps": self.steps, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Raises CheckpointError when names or shapes differ from the model's."""
        saved = state["averages"]
        if set(saved) != set(self.averages):
            differing = sorted(set(saved) ^ set(self.averages))
            raise CheckpointError(f"ema state does not fit the model: {len(differing)} names differ ({differing[0]})")
        parts: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"ema state of {name} has shape {list(saved[name].shape)}, expected {list(parameter.shape)}"
                )
            shard = shard_of(parameter)
            parts[name] = saved[name] if shard is None else shard.unwrap(saved[name], f"ema state of {name}")
        for name, average in self.averages.items():
            average.copy_(parts[name])
        self.steps = int(state["steps"])
