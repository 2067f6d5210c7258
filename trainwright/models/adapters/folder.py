"""A folder of adapters, ours or peft's: which method it holds, and for which parameters of a model."""

from __future__ import annotations

import dataclasses
import re
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.adapters.held import is_other_weight
from trainwright.models.adapters.names import PREFIX, FileNames
from trainwright.models.adapters.options import AdapterOptions, Base
from trainwright.models.adapters.saving import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_FIELDS
from trainwright.models.adapters.targets import head_modules, head_parameters
from trainwright.models.fields import config_from_fields
from trainwright.models.importing import read_json
from trainwright.models.registry import ModelConfig

__all__ = ["SavedAdapter", "is_adapter_folder"]

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways of peft to begin that change the weights of the base, which its file then does not hold."""

_OTHER_FORMS = (
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Fields of peft's configuration that, where they are set, make adapters compute something else."""


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder holds adapters."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


class SavedAdapter:
    """The adapters in a folder; opened when it is made, read when they are asked for.

    Attributes:
        base: the folder or name of the model that they belong to, as their configuration has it; None if it is silent.
        values: the configuration. fields: what our own folders say beside it; empty for peft's.
        shapes: of the tensors in the file, by name.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ModelError: files are missing or damaged, or the adapters are of another method or form."""
        self.folder = Path(folder)
        if not is_adapter_folder(self.folder):
            raise ModelError(
                f"{self.folder} holds no adapters: it has no {ADAPTER_CONFIG}",
                hint="name the folder that save_adapter or peft wrote; in a run it is adapter/",
            )
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
        names = self._file.offset_keys()
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in names}

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file."""
        value: Tensor = self._file.get_tensor(key)
        return value

    def _refuse_other_forms(self) -> None:
        values = self.values
        problems = []
        if values.get("peft_type") != "LORA":
            problems.append(f"peft_type is {values.get('peft_type')!r}, and LORA is read")
        problems += [f"{key} is set" for key in _OTHER_FORMS if values.get(key)]
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
        try:
            rank, alpha = int(values["r"]), float(values["lora_alpha"])
            dropout = float(values.get("lora_dropout") or 0.0)
        except (KeyError, TypeError, ValueError):
            seen = ", ".join(f"{key}: {values.get(key)!r}" for key in ("r", "lora_alpha", "lora_dropout"))
            raise ModelError(f"{self.folder / ADAPTER_CONFIG}: expected numbers, seen {seen}") from None
        return AdapterOptions(name=name, rank=rank, alpha=alpha, dropout=dropout, base=base)

    @property
    def model_config(self) -> ModelConfig | None:
        """The model that they stand in, with its task's head; None for folders of peft, which do not say it."""
        fields = self._section("model")
        return None if fields is None else config_from_fields(fields)

    @property
    def held(self) -> Base:
        """How the frozen weights were held while they were trained; of peft's folders nothing is known."""
        known: Any = self.fields.get("base", "as_is")
        if known not in get_args(Base):
            raise ModelError(f"{self.folder / MODEL_FIELDS}: base is {known!r}, expected {', '.join(get_args(Base))}")
        held: Base = known
        return held

    @property
    def generation(self) -> dict[str, Any] | None:
        """What generation_config.json of the trained model says beyond its configuration; None where nobody said it."""
        return self._section("generation")

    def _section(self, key: str) -> dict[str, Any] | None:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{self.folder / MODEL_FIELDS}: {key} is {value!r}, expected fields")
        return value

    @cached_property
    def modules(self) -> frozenset[str]:
        """Linears that have an adapter, by their names in transformers."""
        found = (re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight", key) for key in self.shapes)
        return frozenset(match[1] for match in found if match is not None)

    @cached_property
    def extra(self) -> frozenset[str]:
        """Other parameters in the file, by their names in transformers."""
        adapters = re.compile(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$")
        return frozenset(key.removeprefix(PREFIX) for key in self.shapes if not adapters.search(key))

    def targets_in(self, model: nn.Module, config: Any | None, *, base: Base = "as_is") -> AdapterOptions:
        """Their options for a model without adapters: `targets` and `train` name what the file has, one by one.

        Raises:
            ModelError: the model lacks a linear or a parameter that the file has, or has other weights than those
                that the adapters were trained beside.
        """
        if not self.modules:
            raise ModelError(f"{self.folder / ADAPTER_WEIGHTS} has no adapters beside linears")
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
        for key, sample in (self._section("base_sample") or {}).items():
            if key in linears and is_other_weight(sample, model.get_parameter(f"{linears[key]}.weight")):
                raise ModelError(
                    f"{self.folder}: the adapters were trained beside other weights than the model's ({key})",
                    hint="use the very model that they were trained on; a model trained anew, or further, is another",
                )
        heads = head_modules(model)
        for name in wanted:
            if model.get_submodule(name) in heads:
                raise ModelError(
                    f"{self.folder}: an adapter stands beside the head {name}, which has none here",
                    hint="open them with peft, merge them there (merge_and_unload) and save the model",
                )
        of_head = head_parameters(model)
        train = [
            name
            for name, parameter in model.named_parameters()
            if name not in of_head and names.parameter(name, tuple(parameter.shape)) in self.extra
        ]
        return dataclasses.replace(
            self.options(base=base),
            targets=tuple(f"^{re.escape(name)}$" for name in linears.values() if name in wanted),
            train=tuple(f"^{re.escape(name)}$" for name in train),
        )
