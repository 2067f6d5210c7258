"""A configuration as plain fields: what a recipe writes out under `model.config` and what a checkpoint carries along.

Unlike `config.json` this keeps everything that the native module knows, such as a bias-free gpt2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.heads import head_fields, head_from_fields
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.registry import FAMILIES, ModelConfig, refuse_unknown_fields
from trainwright.ops.rotary import RotaryScaling

__all__ = ["config_fields", "config_from_fields"]


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """JSON values from which `config_from_fields` makes an equal configuration."""
    values = {"family": config.family, **dataclasses.asdict(config)}
    del values["head"]
    if config.head is not None:
        values["head"] = head_fields(config.head)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def config_from_fields(values: Mapping[str, Any]) -> ModelConfig:
    """A configuration from `family` and any fields of it; fields that are left out have their defaults.

    Raises:
        ModelError: unknown family or field (with the nearest name), a field missing, values that do not fit together.
    """
    family = FAMILIES.get(str(values.get("family")))
    if family is None:
        raise ModelError(f"model family {values.get('family')!r} is unknown", hint=f"known: {', '.join(FAMILIES)}")
    known = {field.name: field for field in dataclasses.fields(family.config_class)}
    given = {key: value for key, value in values.items() if key != "family"}
    if family.config_class is HuggingFaceConfig:
        head = given.get("head")
        return HuggingFaceConfig.from_fields(
            {**given, "head": head_from_fields(head) if isinstance(head, Mapping) else head}
        )
    refuse_unknown_fields(family, given)
    missing = [
        name
        for name, field in known.items()
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ModelError(
            f"a {family.name} configuration needs {', '.join(missing)}", hint="write them out, or use a preset"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if isinstance(given.get("head"), Mapping):
        given["head"] = head_from_fields(given["head"])
    if isinstance(given.get("rope_scaling"), Mapping):
        given["rope_scaling"] = _rotary_scaling(given["rope_scaling"])
    config: ModelConfig = family.config_class(**given)
    return config


def _rotary_scaling(values: Mapping[str, Any]) -> RotaryScaling:
    try:
        return RotaryScaling(**values)
    except TypeError as error:
        raise ModelError(f"rope_scaling: {error}") from error
