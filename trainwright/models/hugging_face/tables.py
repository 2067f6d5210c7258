"""Tables that a transformers model computes when it is made (rotations, say) and that no file has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["KeptTables"]


class KeptTables(nn.Module):
    """A module whose tables keep type and values whatever its parameters become: nothing would make them again."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As torch's, but tables keep their type: they were made in the type that they need."""
        before = _tables(self)
        super()._apply(fn, recurse)
        for (name, leaf), buffer in before.items():
            module = self.get_submodule(name)
            after = module._buffers[leaf]
            assert after is not None
            if after.dtype != buffer.dtype:
                module._buffers[leaf] = buffer.to(after.device)
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """As torch's, but tables keep their values."""
        before = _tables(self)
        super().to_empty(device=device, recurse=recurse)
        for (name, leaf), buffer in before.items():
            self.get_submodule(name)._buffers[leaf] = buffer.to(device)
        return self


def _tables(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """(name of the module, name in it) -> buffer that no file has."""
    return {
        (name, leaf): buffer
        for name, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(leaf)) is not None
    }
