"""`fp16`, `bf16`, `torch_autocast`, `amp`, `data_types` and how gradients travel: formats of numbers."""

from __future__ import annotations

from typing import Any

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    BOOL,
    NUMBER,
    POSITIVE,
    TEXTS,
    Block,
    Entry,
    Maps,
    NoEffect,
    NotBuilt,
    WholeNumber,
    off_block,
)
from trainwright.config.fields import Listed, Name, Real, Words

__all__ = ["NUMBERS", "convert"]

FORMATS = Words(("fp32", "fp16", "bf16"))
LONG_FORMATS = Words(
    (
        *("fp32", "float32", "float", "torch.float32", "fp16", "float16", "half", "torch.float16"),
        *("bf16", "bfloat16", "torch.bfloat16"),
    )
)
PATTERNS = Listed(("auto",), Name(what_it_is="a name pattern"), empty=True)
GRADIENTS = "gradients are summed and kept in fp32 between micro-batches, which is exact for every choice"
ONCE = "gradients are summed in fp32 and divided once, so they need no scaling on the way"

BF16: dict[str, Entry] = {
    "enabled": Maps("precision.name", BOOL, False, "true: bf16, with fp32 weights in the optimizer"),
    "immediate_grad_update": NoEffect(GRADIENTS, BOOL, False),
    "check_grad_overflow": Maps("on_nan", BOOL, True, "true: skip; false: ignore"),
    "check_overflow": NoEffect("check_grad_overflow has taken its place", BOOL),
    "bf16_master_weights_and_grads": NotBuilt(
        "bf16 weights without a copy or compensation",
        BOOL,
        (False,),
        "Trainwright's own precision {name: bf16_pure, update: kahan or stochastic} loses no small updates.",
    ),
    "bf16_optimizer_states": NotBuilt("optimizer state in bf16", BOOL),
}

FP16: dict[str, Entry] = {
    "enabled": Maps("precision.name", BOOL, False, "true: fp16, with fp32 weights in the optimizer"),
    "auto_cast": NoEffect("inputs are cast where a product needs it", BOOL, False),
    "loss_scale": Maps("precision.loss_scale", Real(minimum=0), 0.0, "0: dynamic"),
    "initial_scale_power": Maps("precision.initial_scale", WholeNumber(maximum=127), 16, "2 to this power"),
    "loss_scale_window": Maps("precision.window", POSITIVE, 1000),
    "hysteresis": Maps("precision.hysteresis", POSITIVE, 2),
    "consecutive_hysteresis": NotBuilt("hysteresis that fills up again at each step without overflow", BOOL),
    "min_loss_scale": Maps("precision.min_scale", NUMBER, 1),
    "fp16_master_weights_and_grads": NotBuilt("fp16 weights in the optimizer", BOOL, (False,), "They lose updates."),
    "fp16_optimizer_states": NotBuilt("optimizer state in fp16", BOOL),
}

NUMBERS: dict[str, Entry] = {
    "fp16": Block(FP16, "enabled"),
    "bf16": Block(BF16, "enabled"),
    "bfloat16": Block(BF16, "enabled"),
    "torch_autocast": Block(
        {
            "enabled": Maps("precision.name", BOOL, False, "true: as dtype says, with fp32 weights"),
            "dtype": Maps("precision.name", LONG_FORMATS, "bfloat16"),
            "lower_precision_safe_modules": NoEffect("communication_data_type says how gradients travel", TEXTS),
        },
        "enabled",
    ),
    "amp": off_block(
        "NVIDIA Apex",
        *("opt_level", "cast_model_type", "patch_torch_functions", "keep_batchnorm_fp32", "master_weights"),
        *("cast_model_outputs", "num_losses", "verbosity", "loss_scale", "min_loss_scale", "max_loss_scale"),
        instead="Use bf16 or fp16.",
    ),
    "data_types": Block(
        {
            "grad_accum_dtype": NoEffect(GRADIENTS, LONG_FORMATS),
            "param_dtype": Maps("precision.name", LONG_FORMATS, None, "as bf16 or fp16 says; else it is refused"),
            "buffer_dtype": NotBuilt("another format of buffers than the model has", LONG_FORMATS, (None,)),
            "keep_in_fp32_modules": NoEffect("it is about buffers, and only parameters are cast", PATTERNS, "auto"),
        }
    ),
    "communication_data_type": Maps("comm.wire", FORMATS),
    "seq_parallel_communication_data_type": NoEffect(
        "gradients of context ranks are summed in fp32, as all are", FORMATS, "fp32"
    ),
    "prescale_gradients": NoEffect(ONCE, BOOL, False),
    "gradient_predivide_factor": NoEffect(ONCE, NUMBER, 1.0),
    "gradient_allreduce_op": NotBuilt(
        "a sum of gradients that is not divided by the number of ranks",
        Words(("mean", "sum")),
        ("mean",),
        "Multiply the learning rate instead.",
    ),
    "sparse_gradients": NoEffect("gradients of embeddings travel dense; their sums are the same", BOOL, False),
}


def convert(found: Import) -> None:
    """precision, comm.wire."""
    if found.has("communication_data_type"):
        found.put("communication_data_type", "comm.wire", found.get("communication_data_type"))
    sources = [key for key in ("fp16", "bf16", "bfloat16", "torch_autocast") if found.values.get(f"{key}.enabled")]
    for other in sources[1:]:
        found.refuse(f"{other}.enabled", f"seen true beside {sources[0]}.enabled, expected one format of numbers.")
        for key in list(found.values):
            if key.startswith(f"{other}."):
                found.idle(key, f"{sources[0]} comes first")
    source = sources[0] if sources else ""
    if source == "torch_autocast":
        name = _short(found.get("torch_autocast.dtype"))
        found.put("torch_autocast.enabled", "precision.name", name)
        found.put("torch_autocast.dtype", "precision.name", name)
    elif source:
        name = "fp16" if source == "fp16" else "bf16"
        found.put(f"{source}.enabled", "precision.name", name)
    else:
        name = "fp32"
        found.put("bf16.enabled", "precision.name", name, because=" (neither bf16 nor fp16 is on)")
    if source == "fp16":
        _convert_loss_scale(found)
    if source in ("bf16", "bfloat16"):
        check = f"{source}.check_grad_overflow"
        found.put(check, "on_nan", "skip" if found.get(check) else "ignore")
    _check_parameters(found, name)


def _short(dtype: str) -> str:
    word = dtype.removeprefix("torch.")
    return {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}.get(word, word)


def _convert_loss_scale(found: Import) -> None:
    scale: Any = found.get("fp16.loss_scale")
    found.put("fp16.loss_scale", "precision.loss_scale", scale or "dynamic")
    dynamic = {
        "initial_scale_power": ("initial_scale", 2.0 ** found.get("fp16.initial_scale_power")),
        "loss_scale_window": ("window", found.get("fp16.loss_scale_window")),
        "hysteresis": ("hysteresis", found.get("fp16.hysteresis")),
        "min_loss_scale": ("min_scale", found.get("fp16.min_loss_scale")),
    }
    for key, (target, value) in dynamic.items():
        if scale:
            found.idle(f"fp16.{key}", f"fp16.loss_scale is {scale:g} all along")
        else:
            found.put(f"fp16.{key}", f"precision.{target}", value)


def _check_parameters(found: Import, name: str) -> None:
    key = "data_types.param_dtype"
    wanted = found.get(key)
    if wanted is not None and _short(wanted) == name:
        found.put(key, "precision.name", name)
    elif wanted is not None:
        found.refuse(key, f"seen '{wanted}' beside {name}: parameters of another format are not built yet.")
