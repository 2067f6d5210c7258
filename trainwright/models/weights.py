"""How a family's parameters stand in a Hugging Face file: same names, a few of them reordered or transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainwright.models.head_files import file_prefix

__all__ = ["FilePart", "WeightFormat", "kept_tensors"]


class FilePart(NamedTuple):
    """name: of a tensor in a file. row: which row of our parameter it is; None for all of it."""

    name: str
    row: int | None


def _same_name(name: str) -> str:
    return name


def _whole(config: Any, name: str, shape: Sequence[int]) -> list[FilePart]:
    return [FilePart(name, None)]


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model is, by name: its parameters, a tied one once, and the buffers that its state has."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


@dataclass(frozen=True)
class WeightFormat:
    """The border between our parameters and a checkpoint file.

    prefix: what the trunk's parameters begin with (`model.`); files saved from the bare trunk leave it out.
    to_file, from_file: (config, name, tensor) -> tensor in the other side's layout.
    file_shape: (name, shape of our parameter) -> its shape in the file.
    zeros: config -> names and shapes that the file needs and our model does not have (all zero).
    ignored: name endings of buffers that older releases saved; they hold no weights.
    parts: (config, name, shape of our parameter) -> the tensors of the file that it is made of, where these are others
        than the one of its name: either one, or one for each row. The other functions get the name in the file.
    fp32: name endings of tensors that stay fp32 whatever the type of the others.
    other_name: a name that files of some releases have -> today's name of the same tensor.
    unused: beginnings of tensors that files may have and nothing here needs.
    """

    prefix: str
    to_file: Callable[[Any, str, Tensor], Tensor]
    from_file: Callable[[Any, str, Tensor], Tensor]
    file_shape: Callable[[str, Sequence[int]], tuple[int, ...]]
    zeros: Callable[[Any], dict[str, tuple[int, ...]]]
    ignored: tuple[str, ...]
    parts: Callable[[Any, str, Sequence[int]], list[FilePart]] = _whole
    fp32: tuple[str, ...] = ()
    other_name: Callable[[str], str] = _same_name
    unused: tuple[str, ...] = ()

    def placed(self, config: Any, name: str, shape: Sequence[int]) -> list[FilePart]:
        """`parts`, under the names that the class which the configuration is saved as has for its trunk."""
        prefix = file_prefix(config, self.prefix)
        parts = self.parts(config, name, shape)
        if prefix == self.prefix:
            return parts
        renamed = []
        for part in parts:
            inner = part.name.removeprefix(self.prefix)
            renamed.append(part if inner == part.name else FilePart(prefix + inner, part.row))
        return renamed

    def file_shapes(self, config: Any, name: str, shape: Sequence[int]) -> dict[FilePart, tuple[int, ...]]:
        """The parts of a parameter and their shapes in the file."""
        return {
            part: self.file_shape(part.name, shape if part.row is None else shape[1:])
            for part in self.placed(config, name, shape)
        }
