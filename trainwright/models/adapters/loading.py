"""Adapters from files: ours, or those that peft wrote for the transformers model of the same weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.adapters.apply import AdapterReport, adapter_report, apply_adapter
from trainwright.models.adapters.linear import ADAPTER_LEAVES
from trainwright.models.adapters.names import PREFIX, FileNames
from trainwright.models.adapters.options import AdapterOptions, Base
from trainwright.models.adapters.saving import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_FIELDS
from trainwright.models.adapters.targets import task_head_of
from trainwright.models.fields import config_from_fields
from trainwright.models.importing import read_json
from trainwright.models.registry import ModelConfig

__all__ = ["SavedAdapter", "is_adapter_folder", "load_adapter", "saved_values"]

_SHOWN = 6
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "eva")
"""Ways of peft to begin that change the weights of the base, which its file then does not hold."""


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder holds adapters."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


class SavedAdapter:
    """The adapters in a folder; opened when it is made, read when they are asked for.

    Attributes:
        base: the folder or name of the model that they belong to, as their configuration has it; None if it is silent.
        values: the configuration.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ModelError: files are missing or damaged, or the adapters are of another method or form."""
        self.folder = Path(folder)
        self.values = read_json(self.folder / ADAPTER_CONFIG)
        self._refuse_other_forms()
        base = self.values.get("base_model_name_or_path")
        self.base = str(base) if base else None
        known = self.folder / MODEL_FIELDS
        self.fields: dict[str, Any] = read_json(known) if known.is_file() else {}
        path = self.folder / ADAPTER_WEIGHTS
        if not path.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            raise ModelError(
                f"{self.folder} has no {ADAPTER_WEIGHTS}" + (", and a pickle can run code: it is not read" * pickled),
                hint="save the adapters as safetensors (peft's default)",
            )
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}", hint="get the file again") from error
        self._shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def _refuse_other_forms(self) -> None:
        values = self.values
        problems = []
        if values.get("peft_type") != "LORA":
            problems.append(f"peft_type is {values.get('peft_type')!r}, and LORA is read")
        for key in (
            "rank_pattern",
            "alpha_pattern",
            "layer_replication",
            "target_parameters",
            "trainable_token_indices",
        ):
            if values.get(key):
                problems.append(f"{key} is set")
        if values.get("bias", "none") != "none" or values.get("lora_bias"):
            problems.append("biases are trained")
        start = values.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            problems.append(f"init_lora_weights {start!r} changed the base's weights")
        if problems:
            raise ModelError(
                f"{self.folder}: adapters of a form that is not read: {'; '.join(problems)}",
                hint="open them with peft, merge them there (merge_and_unload) and save the model",
            )

    def options(self, *, base: Base = "as_is") -> AdapterOptions:
        """Their method; `targets_in` says of which linears."""
        values = self.values
        name = "dora" if values.get("use_dora") else "rslora" if values.get("use_rslora") else "lora"
        if values.get("use_dora") and values.get("use_rslora"):
            raise ModelError(f"{self.folder}: DoRA scaled by the root of the rank is not read")
        return AdapterOptions(
            name=name,
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            base=base,
        )

    @property
    def model_config(self) -> ModelConfig | None:
        """The model that they stand in, with its task's head; None for folders of peft, which do not say it."""
        fields = self.fields.get("model")
        return None if fields is None else config_from_fields(fields)

    @property
    def held(self) -> Base:
        """How the frozen weights were held while they were trained; of peft's folders nothing is known."""
        known: Base = self.fields.get("base", "as_is")
        return known

    @cached_property
    def modules(self) -> frozenset[str]:
        """Linears that have an adapter, by their names in transformers."""
        found = (re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_A\.weight", key) for key in self._shapes)
        return frozenset(match[1] for match in found if match is not None)

    @cached_property
    def extra(self) -> frozenset[str]:
        """Other parameters in the file, by their names in transformers."""
        adapters = re.compile(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$")
        return frozenset(key.removeprefix(PREFIX) for key in self._shapes if not adapters.search(key))

    def targets_in(self, model: nn.Module, config: Any | None, *, base: Base = "as_is") -> AdapterOptions:
        """Their options for a model without adapters: `targets` and `train` name what the file has, one by one.

        Raises:
            ModelError: the model lacks a linear or a parameter that the file has.
        """
        names = FileNames(config)
        linears = {
            names.module(name, module.weight.shape): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        lost = sorted(self.modules - set(linears))
        if lost:
            raise ModelError(
                f"{self.folder}: the model has no linear {lost[0]!r} ({len(lost)} such)",
                hint="the adapters belong to another model; base_model_name_or_path is "
                f"{self.base or 'not in adapter_config.json'}",
            )
        wanted = {name for key, name in linears.items() if key in self.modules}
        head = task_head_of(model)
        of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
        train = [
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in of_head and names.parameter(name, tuple(parameter.shape)) in self.extra
        ]
        return dataclasses.replace(
            self.options(base=base),
            targets=tuple(f"^{re.escape(name)}$" for name in linears.values() if name in wanted),
            train=tuple(f"^{re.escape(name)}$" for name in train),
        )

    def read(
        self, report: AdapterReport, config: Any | None, shapes: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Tensor]:
        """Every value of the file under the name that it has in a model with these adapters.

        Args:
            config: of the model; None where its names are those of transformers.
            shapes: of its parameters.

        Raises:
            ModelError: file and model do not have the same parameters; names some.
        """
        names = FileNames(config)
        expected: dict[str, tuple[str, str, tuple[int, int]]] = {}
        for module, linear in report.linears.items():
            shape = (linear.out_features, linear.in_features)
            for leaf in ADAPTER_LEAVES:
                if leaf != "magnitude" or report.options.name == "dora":
                    expected[names.tensor(module, shape, leaf)] = (module, leaf, shape)
        extra = {
            PREFIX + part.name: (name, part)
            for name in report.extra
            if name in shapes
            for part in names.parts(name, shapes[name])
        }
        missing = [key for key in (*expected, *extra) if key not in self._shapes]
        unknown = [key for key in self._shapes if key not in expected and key not in extra]
        if missing or unknown:
            parts = [
                f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' if len(keys) > _SHOWN else ''}"
                for what, keys in (("missing", missing), ("not of this model", unknown))
                if keys
            ]
            raise ModelError(
                f"{self.folder}: the adapters do not fit the model ({' | '.join(parts)})",
                hint="rank, method and targets must be those with which they were saved, and the base the same model",
            )
        found = {
            f"{module}.{leaf}": names.from_file(module, shape, leaf, self._file.get_tensor(key))
            for key, (module, leaf, shape) in expected.items()
        }
        for key, (name, part) in extra.items():
            value = names.part_from_file(part, self._file.get_tensor(key))
            if part.row is None:
                found[name] = value
            else:
                found.setdefault(name, torch.empty(tuple(shapes[name]), dtype=value.dtype))[part.row] = value
        for name, value in found.items():
            if tuple(shapes[name]) != tuple(value.shape):
                raise ModelError(f"{self.folder}: {name} is {list(value.shape)}, expected {list(shapes[name])}")
        return found


def load_adapter(model: nn.Module, folder: str | Path, *, base: Base = "as_is") -> AdapterReport:
    """Give a model that has its weights the adapters of a folder, in place.

    Args:
        model: the one that the adapters were trained on, with their task's head where they have one.
        base: how the frozen weights are held from now on.

    Raises:
        ModelError: the folder holds no adapters that can be read, or they do not fit the model (names some).
    """
    saved = SavedAdapter(folder)
    config: Any = getattr(model, "config", None)
    config = config if hasattr(config, "family") else None
    options = saved.targets_in(model, config, base=base)
    report = apply_adapter(model, options)
    parameters = dict(model.named_parameters())
    values = saved.read(report, config, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return report


def saved_values(model: nn.Module, folder: str | Path) -> Mapping[str, Tensor]:
    """Values of a folder of adapters by name, for `adapter_values(saved=...)`: a model with adapters goes on from them.

    Args:
        model: with adapters, whole or on the meta device, not divided yet.

    Raises:
        ModelError: the folder's adapters are of another method, or not beside the same linears.
    """
    report = adapter_report(model)
    if report is None:
        raise ModelError(f"{type(model).__name__} has no adapters to give the values of {folder}")
    saved = SavedAdapter(folder)
    mine, theirs = report.options, saved.options()
    for what in ("name", "rank", "alpha"):
        if getattr(mine, what) != getattr(theirs, what):
            raise ModelError(
                f"the adapters in {folder} have {what} {getattr(theirs, what)}, expected {getattr(mine, what)}",
                hint=f"set adapter.{what} to {getattr(theirs, what)}",
            )
    config: Any = getattr(model, "config", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return saved.read(report, config if hasattr(config, "family") else None, shapes)
