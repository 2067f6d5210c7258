"""Files whose tensors are put together or taken apart when transformers loads them (experts, fused projections)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainwright.models.hugging_face.library import is_converted, load_whole
from trainwright.models.hugging_face.structure import structure

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["WholeTensors", "readable"]


class WholeTensors:
    """The tensors of a whole model in memory, by the names that the model has for them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in tensors.items()}

    def read(self, key: str) -> Tensor:
        """The tensor of that name."""
        return self._tensors[key]


def readable(tensors: Any, folder: Path, config: HuggingFaceConfig) -> Any:
    """The tensors of a folder's files as they are; or, where the files hold other ones than the model has, as
    transformers makes them: then the whole model is in memory at once, on every rank that reads."""
    facts = structure(config)
    if not is_converted(facts.model):
        return tensors
    known = {facts.file_names.get(name, name) for name in facts.model.state_dict()}
    lacking = [name for name in known if name not in tensors.shapes and name not in facts.aliases]
    if not lacking:
        return tensors
    return WholeTensors(load_whole(config.model_class, str(folder)))
