"""Our names and layouts of adapters, and those that peft has for the transformers model of the same weights.

peft's tensors are called base_model.model.<module>.lora_A.weight; <module> is the name in transformers. Where a file
has the rows of a weight in another order than we have (interleaved rotations, gpt2's fused projection), the rows of B
and of magnitudes are reordered alike; columns never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.models.hugging_face.structure import structure
from trainwright.models.registry import family_of, model_plan
from trainwright.models.weights import FilePart

__all__ = ["PREFIX", "FileNames", "FileTensor"]

PREFIX = "base_model.model."
_LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class FileTensor:
    """What a tensor of an adapter file is of a model.

    Attributes:
        name: of our parameter. shape: in the file.
        linear: (name, shape of its weight) of the linear that it is the adapter of; else None.
        part: which part of another parameter it is.
    """

    name: str
    shape: tuple[int, ...]
    linear: tuple[str, tuple[int, int]] | None = None
    part: FilePart | None = None


class FileNames:
    """The names of one model's adapters.

    Args:
        config: of a model that the registry knows; None for any other module, whose names are those of the file.
    """

    def __init__(self, config: Any | None) -> None:
        self._config = config
        self._weights = None if config is None else family_of(config).weights

    def parameter(self, name: str, shape: Sequence[int]) -> str:
        """The name of a parameter in a file; of several that it is made of, the first."""
        return self.parts(name, shape)[0].name

    def parts(self, name: str, shape: Sequence[int]) -> list[FilePart]:
        """The tensors of a file that a parameter is made of."""
        return [FilePart(name, None)] if self._weights is None else self._weights.placed(self._config, name, shape)

    def file_shapes(self, name: str, shape: Sequence[int]) -> dict[FilePart, tuple[int, ...]]:
        """`parts` and their shapes in the file."""
        if self._weights is None:
            return {FilePart(name, None): tuple(shape)}
        return self._weights.file_shapes(self._config, name, shape)

    def ties(self) -> dict[str, str]:
        """Further names of parameters that the model holds as one (an output head and its embedding) -> the first, as
        files name them. peft copies modules, which unties them: its files need every name."""
        if self._config is None:
            return {}
        if self._config.family == "transformers":
            return dict(structure(self._config).aliases)
        shape = (self._config.vocab_size, self._config.hidden_size)
        pairs = model_plan(self._config).tied
        return {self.parameter(alias, shape): self.parameter(first, shape) for first, alias in pairs}

    def module(self, name: str, shape: Sequence[int]) -> str:
        """The name of a linear with a weight of this shape in a file."""
        return self.parameter(f"{name}.weight", shape).removesuffix(".weight")

    def tensor(self, name: str, shape: Sequence[int], leaf: str) -> str:
        """The name of a part of an adapter in a file of peft."""
        return f"{PREFIX}{self.module(name, shape)}.{_LEAVES[leaf]}"

    def transposed(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the file has the weight of a linear as [in, out]."""
        if self._weights is None:
            return False
        in_file = self.module(name, shape) + ".weight"
        return self._weights.file_shape(in_file, (2, 3)) == (3, 2)

    def rows(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """For each row of a weight in the file, which of ours it is: int64 [O]; None where the order is the same."""
        if self._weights is None:
            return None
        in_file = self.module(name, shape) + ".weight"
        ours = torch.arange(shape[0], dtype=torch.float64)[:, None]
        theirs = self._weights.to_file(self._config, in_file, ours).reshape(-1).long()
        return None if torch.equal(theirs, ours[:, 0].long()) else theirs

    def to_file(self, name: str, shape: Sequence[int], leaf: str, value: Tensor) -> Tensor:
        """A part of an adapter as the file has it."""
        rows = None if leaf == "lora_A" else self.rows(name, shape)
        return value if rows is None else value[rows.to(value.device)]

    def from_file(self, name: str, shape: Sequence[int], leaf: str, value: Tensor) -> Tensor:
        """A part of an adapter as the model has it."""
        rows = None if leaf == "lora_A" else self.rows(name, shape)
        if rows is None:
            return value
        ours = torch.empty_like(value)
        ours[rows.to(value.device)] = value
        return ours

    def part_to_file(self, part: FilePart, value: Tensor) -> Tensor:
        """Another parameter, or the row of it that `part` is, as the file has it."""
        return value if self._weights is None else self._weights.to_file(self._config, part.name, value)

    def part_from_file(self, part: FilePart, value: Tensor) -> Tensor:
        """Another parameter, or a row of it, as the model has it."""
        return value if self._weights is None else self._weights.from_file(self._config, part.name, value)
