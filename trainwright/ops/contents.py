"""Whether a tensor has values: a model can be run for its shapes alone, where sizes that are data have to be made up.

`torch._subclasses.FakeTensor` has no public name; used in this file only.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ["has_contents"]


def has_contents(tensor: Tensor) -> bool:
    """False on the meta device, and for the tensors of a dry run (FakeTensorMode)."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
