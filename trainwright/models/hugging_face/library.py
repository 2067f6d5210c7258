"""The only file that imports transformers: its configurations, classes and the table from kinds to classes.

Nothing here runs code or opens pickles of a folder: classes are those of the installed library, weights are read
elsewhere.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from trainwright.base.errors import MissingDependencyError, ModelError

__all__ = [
    "KINDS",
    "class_for",
    "generation_options",
    "hf_config",
    "is_converted",
    "is_known",
    "kind_for",
    "load_whole",
    "make_hf_config",
    "saved_names",
    "stored_fields",
    "todays_name",
]

KINDS: dict[str, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModel",
    "text_encoder": "AutoModelForTextEncoding",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
"""What a model is for -> the automatic class of transformers that makes it."""

TRUNKS = ("encoder", "text_encoder")
"""Kinds without any head."""

_NOT_OURS = ("transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype", "_attn_implementation")

_CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of kernels this torch has not, when transformers imports an installed torchao unasked."""


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "models of other architectures need transformers", hint="pip install 'trainwright[transformers]'"
        ) from error
    for name in _CHATTY:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)
    return transformers


def is_known(model_type: object) -> bool:
    """Whether the installed transformers has an architecture of that name."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return False
    return model_type in CONFIG_MAPPING_NAMES


def make_hf_config(values: Mapping[str, Any]) -> Any:
    """A configuration object of transformers from the fields of a `config.json`.

    Raises:
        ModelError: no such architecture, or fields that its configuration refuses.
        MissingDependencyError: transformers is not installed.
    """
    library = _library()
    fields = {key: copy.deepcopy(value) for key, value in values.items() if key not in _NOT_OURS}
    model_type = fields.pop("model_type", None)
    if not is_known(model_type):
        raise ModelError(
            f"transformers {library.__version__} has no architecture of model_type {model_type!r}",
            hint="check model_type in config.json, or install a newer transformers",
        )
    try:
        return library.CONFIG_MAPPING[model_type].from_dict(fields)
    except ModelError:
        raise
    except Exception as error:  # its configurations raise whatever their checks raise
        raise ModelError(f"transformers refuses this {model_type} configuration: {error}") from error


@lru_cache(maxsize=64)
def hf_config(text: str) -> Any:
    """`make_hf_config` of a JSON text; the same object for the same text, so nobody may change it."""
    return make_hf_config(json.loads(text))


def stored_fields(config: Any) -> dict[str, Any]:
    """All fields of a configuration of transformers as JSON values, defaults written out."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if key not in _NOT_OURS}


def kind_for(values: Mapping[str, Any]) -> str:
    """What a model is for: what `architectures` says, else what its architecture is mostly for."""
    from transformers.models.auto import modeling_auto as auto

    tables: dict[str, Mapping[str, str]] = {
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked_lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal_lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    model_type = str(values.get("model_type"))
    named = (values.get("architectures") or [None])[0]
    for kind, table in tables.items():
        if named is not None and table.get(model_type) == named:
            return kind
    config = hf_config(json.dumps(dict(values), sort_keys=True))
    if getattr(config, "is_encoder_decoder", False) and model_type in tables["seq2seq"]:
        return "seq2seq"
    if model_type in tables["masked_lm"] and not getattr(config, "is_decoder", False):
        return "masked_lm"
    if model_type in tables["causal_lm"]:
        return "causal_lm"
    return "encoder"


def has_class(config: Any, kind: str) -> bool:
    """Whether the library has a class for a configuration and what the model is for."""
    return type(config) in getattr(_library(), KINDS[kind])._model_mapping


def class_for(config: Any, kind: str) -> type[Any]:
    """The class of transformers for a configuration and what the model is for.

    Raises:
        ModelError: the library has none.
    """
    if kind not in KINDS:
        raise ModelError(f"a transformers model of kind {kind!r} is unknown", hint=f"known: {', '.join(KINDS)}")
    automatic = getattr(_library(), KINDS[kind])
    try:
        found = automatic._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"transformers has no {config.model_type} model of kind {kind} ({KINDS[kind]} does not know it)",
            hint=f"kinds of this project: {', '.join(KINDS)}",
        ) from None
    return found[0] if isinstance(found, (list, tuple)) else found


def generation_options(**options: Any) -> Any:
    """A `GenerationConfig` of these options; those that are None are left out."""
    return _library().GenerationConfig(**{key: value for key, value in options.items() if value is not None})


def empty_cache() -> Any:
    """A key/value cache of transformers that grows with what is written."""
    return _library().DynamicCache()


def saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Today's name of a tensor of a transformers model -> its name in files, where transformers keeps an older one.

    Empty where a tensor is not the same in both (experts that files hold one by one).
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 files had the names of the model
        return {}
    state = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        try:
            written = revert_weight_conversion(model, {name: state[name]})
        except Exception:  # of several tensors that become one; what it raises for one of them is not said
            continue
        if len(written) == 1:
            (old, value), *_ = written.items()
            if old != name and value.shape == state[name].shape:
                found[name] = old
    return found


def todays_name(model: Any, name: str) -> str:
    """The name that a tensor of a file has in the model by the installed library's rules of renaming."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:
        return name
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    renamed: str = apply_renamings(name, rules)
    return renamed


def is_converted(model: Any) -> bool:
    """Whether files of the architecture hold tensors that are put together or taken apart when they are loaded."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return False
    return any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model))


def load_whole(model_class: Any, folder: str) -> dict[str, Any]:
    """The tensors of a folder as the library loads them: the whole model at once, from safetensors only."""
    model, report = model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    missing = report["missing_keys"] if isinstance(report, dict) else report.missing_keys
    return {name: value for name, value in model.state_dict().items() if name not in missing}
