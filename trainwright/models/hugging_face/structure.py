"""What can be read off a transformers model without weights: a twin on the meta device, its ties, names and places."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainwright.models.hugging_face.library import make_hf_config, saved_names
from trainwright.models.weights import kept_tensors

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["HEAD_PREFIXES", "Structure", "build_module", "structure", "trunk_prefix"]

HEAD_PREFIXES = ("task_head_.",)
"""Names of parameters of a head that transformers has no class for begin like this."""

_building = threading.Lock()


@dataclass(frozen=True)
class Structure:
    """Facts of one configuration.

    Attributes:
        model: on the meta device; never trained, shared by all who ask.
        first_position: number of the first position in a table of learned positions that keeps the numbers before it
            for padding (RoBERTa: padding_idx + 1).
        aliases: second names of tied parameters -> the name that transformers saves.
        file_names: our name of a parameter -> the name that transformers saves, where the two differ.
        state: values of saved buffers, which are not trained.
    """

    model: Any
    first_position: int
    aliases: Mapping[str, str]
    file_names: Mapping[str, str]
    state: Mapping[str, Tensor] = field(repr=False)


@lru_cache(maxsize=8)
def structure(config: HuggingFaceConfig) -> Structure:
    """The facts of a configuration; builds it once on the meta device."""
    model, state = build_module(config)
    aliases, file_names = _ties(model)
    kept = {file_names.get(name, name): name for name in kept_tensors(model)}
    for saved, older in saved_names(model, kept).items():
        file_names[kept[saved]] = older
        aliases = {alias: older if name == saved else name for alias, name in aliases.items()}
    return Structure(model, _first_position(model), aliases, file_names, state)


def build_module(config: HuggingFaceConfig) -> tuple[Any, dict[str, Tensor]]:
    """The module of transformers with its parameters and saved buffers on the meta device, and the saved buffers'
    values. Buffers that no file has (tables of rotations, say) are computed and real, on the CPU."""
    with _building, torch.device("cpu"), _parameters_on_meta():
        model = config.model_class(_own_copy(config))
    state: dict[str, Tensor] = {}
    kept = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in kept:
            state[name] = buffer.detach().clone()
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to("meta")
    return model, state


def _own_copy(config: HuggingFaceConfig) -> Any:
    """Classes write into the configuration that they are given."""
    own = make_hf_config({**config.values, **config.head_values()})
    own._attn_implementation = "sdpa" if getattr(config.model_class, "_supports_sdpa", False) else "eager"
    return own


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules put their parameters on the meta device as soon as they have them; buffers stay real.

    Memory that was only asked for and never written costs nothing, and on the meta device nothing is initialised.
    """
    module_class: Any = nn.Module
    register = module_class.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            moved = type(param)(param.to("meta"), requires_grad=param.requires_grad)
            moved.__dict__.update(param.__dict__)
            module._parameters[name] = moved

    module_class.register_parameter = on_meta
    try:
        yield
    finally:
        module_class.register_parameter = register


def trunk_prefix(model: Any) -> str:
    """What the names of the trunk begin with; empty where the model is its trunk, or has no part of that name."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return f"{prefix}." if prefix and prefix in dict(model.named_children()) else ""


def _ties(model: Any) -> tuple[dict[str, str], dict[str, str]]:
    """(aliases, file names) of a model."""
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    aliases: dict[str, str] = {}
    file_names: dict[str, str] = {}
    for names in groups.values():
        # transformers leaves out what it declares to be tied to something else.
        saved = next((name for name in names if name not in declared), names[0])
        if saved != names[0]:
            file_names[names[0]] = saved
        aliases.update({name: saved for name in names if name != saved})
    return aliases, file_names


def _first_position(model: nn.Module) -> int:
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        counts_padding = hasattr(module, "create_position_ids_from_input_ids")
        if counts_padding and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0
