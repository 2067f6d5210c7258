"""Which tensor of a folder's files each parameter of a model is: by name and shape, before a byte is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainwright.base.errors import ModelError
from trainwright.models.backbone import Backbone
from trainwright.models.head_files import file_prefix, is_head_tensor, label_tensors
from trainwright.models.hugging_face.matching import match_names
from trainwright.models.registry import ModelConfig, family_of
from trainwright.models.weights import kept_tensors

__all__ = ["Matched", "TensorFiles", "match_tensors"]

_SHOWN = 6


class TensorFiles:
    """The tensors of one or several safetensors files, opened lazily and mapped, not read.

    Attributes:
        shapes: by name.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            path = folder / name
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} cannot be read as safetensors: {error}",
                    hint="the file is damaged or cut off; get it again",
                ) from error
            for key in handle.keys():  # noqa: SIM118 - the handle is not a dict
                if key in self._handles:
                    raise ModelError(f"{folder}: tensor {key!r} is in more than one file")
                self._handles[key] = handle
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[key].get_tensor(key)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"tensor {key!r} is {tensor.dtype}; expected floating-point weights of 16 bits or more")
        return tensor


@dataclass(frozen=True)
class Matched:
    """Where the parameters of a model are.

    Attributes:
        sources: name in a file of this model -> name in these files.
        fresh: the model's names of parameters that are in no file.
        notes: sentences for people.
    """

    sources: dict[str, str]
    fresh: frozenset[str]
    notes: tuple[str, ...]


def match_tensors(model: Backbone, theirs: ModelConfig, tensors: TensorFiles, *, fresh: bool) -> Matched:
    """Where in the files each tensor that the model needs is.

    theirs: the configuration of the folder, whose head may be another one. A head of the folder that the model does not
        have is left alone.
    fresh: parameters of the head may be missing.

    Raises:
        ModelError: names all that do not fit.
    """
    config = model.config
    if config.family == "transformers":
        other = config.head != theirs.head
        return Matched(*match_names(model, tensors.shapes, tensors.read, fresh=fresh, other_head=other))
    weights = family_of(config).weights
    ours = {
        name: {part.name: shape for part, shape in weights.file_shapes(config, name, value.shape).items()}
        for name, value in kept_tensors(model).items()
    }
    expected = {name: shape for parts in ours.values() for name, shape in parts.items()}
    seen = _seen(config, theirs, tensors, expected)
    strange = _other_labels(config, theirs, list(ours))
    without = [
        name
        for name, parts in ours.items()
        if name in strange or any(part not in seen and is_head_tensor(part) for part in parts)
    ]
    if not fresh:
        without = []
    excused = {part for name in without for part in ours[name]}
    missing = [name for name in expected if name not in seen and name not in excused]
    wrong = [
        f"{name} is {list(tensors.shapes[seen[name]])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in seen and name not in excused and tensors.shapes[seen[name]] != shape
    ]
    unexpected, unused = _unexpected(model, theirs, tensors, seen, set(expected))
    problems = [
        f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        heads_only = not unexpected and not wrong and all(is_head_tensor(name) for name in missing)
        raise ModelError(
            f"the weights do not fit the configuration (tensors): {' | '.join(problems)}",
            hint="the folder has no such head; training from it starts one at random (load_pretrained(..., seed=0))"
            if heads_only
            else "config.json and the safetensors files must come from the same model",
        )
    return Matched(seen, frozenset(without), tuple(_notes(without, unused)))


def _seen(
    config: ModelConfig, theirs: ModelConfig, tensors: TensorFiles, expected: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """The tensors of the files, by the names that files of this model would have."""
    weights = family_of(config).weights
    prefix, other = file_prefix(config, weights.prefix), file_prefix(theirs, weights.prefix)
    other_head = config.head is not None and theirs.head is not None and config.head.kind != theirs.head.kind
    seen: dict[str, str] = {}
    for key in tensors.shapes:
        if key.endswith(weights.ignored):
            continue
        name = weights.other_name(key)
        if name != key and name in tensors.shapes:
            continue  # the same tensor, twice
        if other and name.startswith(other):
            name = prefix + name.removeprefix(other)
        elif is_head_tensor(name) and not name.startswith("pooler."):
            if other_head:  # the same name may stand for something else
                name = f"{name} (of another head)"
        elif name not in expected:
            name = prefix + name
        seen[name] = key
    return seen


def _other_labels(config: Any, theirs: Any, names: list[str]) -> set[str]:
    """Parameters whose rows are labels, where the folder's labels are others."""
    if config.head is None or theirs.head is None or config.head.labels == theirs.head.labels:
        return set()
    generic = all(label == f"LABEL_{index}" for index, label in enumerate(theirs.head.labels))
    if generic and len(theirs.head.labels) == len(config.head.labels):
        return set()
    return set(label_tensors(config, names))


def _unexpected(
    model: Backbone, theirs: Any, tensors: TensorFiles, seen: dict[str, str], expected: set[str]
) -> tuple[list[str], list[str]]:
    """Names that the model has no place for: those that speak against it, and those of a head that it does not have."""
    config: Any = model.config
    weights = family_of(config).weights
    zeros = weights.zeros(config)
    tied = _tied_names(config)
    unexpected: list[str] = []
    unused: list[str] = []
    for name in seen:
        if name in zeros:
            if tensors.read(seen[name]).count_nonzero():
                unexpected.append(f"{name} (config.json says bias=false but it is not zero)")
        elif name in tied:
            _check_tied(name, tied[name], tensors, seen)
        elif name not in expected and not name.startswith(weights.unused):
            spare = is_head_tensor(name) and (config.head != theirs.head or ".pooler." in name)
            (unused if spare else unexpected).append(name)
    return unexpected, unused


def _tied_names(config: ModelConfig) -> dict[str, str]:
    """Names in files of tensors that the model holds as one: {alias: kept}; empty where no head is tied."""
    if config.head is not None:
        return {}
    weights, plan = family_of(config).weights, family_of(config).plan(config)

    def in_file(name: str) -> str:
        return weights.placed(config, name, (config.vocab_size, config.hidden_size))[0].name

    return {in_file(alias): in_file(kept) for kept, alias in plan.tied}


def _check_tied(alias: str, kept: str, tensors: TensorFiles, seen: dict[str, str]) -> None:
    if kept not in seen:
        return
    head, embedding = tensors.read(seen[alias]), tensors.read(seen[kept])
    if not torch.equal(head, embedding):
        raise ModelError(
            f"config.json ties the output head to the embedding, but {alias} differs from {kept}",
            hint="set tie_word_embeddings to false in config.json",
        )


def _notes(without: Sequence[str], unused: Sequence[str]) -> list[str]:
    notes = []
    if without:
        shown = ", ".join(without[:_SHOWN]) + (", ..." if len(without) > _SHOWN else "")
        notes.append(f"the folder has no weights for this head, which starts at random: {shown}")
    if unused:
        shown = ", ".join(unused[:_SHOWN]) + (", ..." if len(unused) > _SHOWN else "")
        notes.append(f"the folder's own head is not used: {shown}")
    return notes
