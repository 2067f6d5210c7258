"""How a family's parameters stand in a Hugging Face file: same names, a few of them reordered or transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["WeightFormat"]


@dataclass(frozen=True)
class WeightFormat:
    """The border between our parameters and a checkpoint file.

    prefix: trunk prefix (`model.`) that files saved from the bare trunk leave out.
    to_file, from_file: (config, name, tensor) -> tensor in the other side's layout.
    file_shape: (name, shape of our parameter) -> its shape in the file.
    zeros: config -> names and shapes that the file needs and our model does not have (all zero).
    ignored: name endings of buffers that older releases saved; they hold no weights.
    """

    prefix: str
    to_file: Callable[[Any, str, Tensor], Tensor]
    from_file: Callable[[Any, str, Tensor], Tensor]
    file_shape: Callable[[str, Sequence[int]], tuple[int, ...]]
    zeros: Callable[[Any], dict[str, tuple[int, ...]]]
    ignored: tuple[str, ...]
