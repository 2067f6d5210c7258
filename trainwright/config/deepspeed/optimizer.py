"""`optimizer` and `gradient_clipping`: the types that DeepSpeed builds, with its defaults and not ours."""

from __future__ import annotations

from typing import Any

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    ANY,
    BOOL,
    NUMBER,
    POSITIVE,
    Choice,
    Entry,
    Maps,
    NoEffect,
    NotBuilt,
    Variants,
)
from trainwright.config.fields import Listed, Real, Words

__all__ = ["OPTIMIZER", "convert"]

BETAS = Listed((), Real(minimum=0, below=1), 2)
RATE = Real(minimum=0)
ONE_KERNEL = "the fastest implementation for the device is chosen"
STATE = "optimizer state is fp32 in any case"


def _common(lr: float) -> dict[str, Entry]:
    return {
        "lr": Maps("optim.lr", RATE, lr),
        "weight_decay": Maps("optim.weight_decay", RATE, 0.0, "of every parameter, norms and biases too"),
        "max_grad_norm": NotBuilt("a norm among the optimizer's own keys", RATE, (0, 0.0), "Use gradient_clipping."),
        "maximize": NotBuilt("maximizing", BOOL),
        "differentiable": NotBuilt("a differentiable step", BOOL),
        **dict.fromkeys(("foreach", "fused", "capturable"), NoEffect(ONE_KERNEL, BOOL)),
    }


ADAM: dict[str, Entry] = {
    **_common(1e-3),
    "betas": Maps("optim.betas", BETAS, (0.9, 0.999)),
    "eps": Maps("optim.eps", RATE, 1e-8),
    "bias_correction": NotBuilt("Adam without bias correction", BOOL, (True,)),
    "amsgrad": NotBuilt("AMSGrad", BOOL),
    "torch_adam": Maps("optim.weight_decay", BOOL, False, "true: 0.01 where none is given, as torch has it"),
    "adam_w_mode": Maps("optim.name", BOOL, True, "false (L2 decay) is refused, unless weight_decay is 0"),
    "adamw_mode": NoEffect("DeepSpeed sets it by adam_w_mode", BOOL, True),
    "set_grad_none": NoEffect("gradients are freed after a step", BOOL, True),
    "fp32_optimizer_states": NotBuilt("optimizer state of less than fp32", BOOL, (True,)),
}

LION: dict[str, Entry] = {
    **_common(1e-3),
    "betas": Maps("optim.betas", BETAS, (0.9, 0.999)),
    "set_grad_none": NoEffect("gradients are freed after a step", BOOL, True),
    "fp32_optimizer_states": NotBuilt("optimizer state of less than fp32", BOOL, (True,)),
}

SGD: dict[str, Entry] = {
    **_common(1e-3),
    "momentum": Maps("optim.momentum", Real(minimum=0, below=1), 0.0),
    "nesterov": Maps("optim.nesterov", BOOL, False),
    "dampening": NotBuilt("dampening of momentum", NUMBER, (0.0,)),
}

ADAFACTOR: dict[str, Entry] = {
    **_common(1e-2),
    "beta2_decay": Maps("optim.beta2_decay", Real(maximum=0), -0.8),
    "d": Maps("optim.update_clip", Real(minimum=1), 1.0),
    "eps": NotBuilt("other small numbers in Adafactor", ANY, ([None, 0.001], (None, 0.001))),
}

MUON: dict[str, Entry] = {
    **_common(0.02),
    "muon_lr": Maps("optim.lr", RATE, None, "must be equal to adam_lr"),
    "adam_lr": Maps("optim.lr", RATE, None, "must be equal to muon_lr"),
    "momentum": Maps("optim.momentum", Real(minimum=0, below=1), 0.95),
    "betas": Maps("optim.betas", BETAS, (0.9, 0.95)),
    "eps": Maps("optim.eps", RATE, 1e-10),
    "ns_method": NoEffect("both iterations reach the same matrix, up to rounding", Words(("gram", "standard")), "gram"),
    "per_head_muon": NotBuilt("Muon for each attention head", BOOL),
    "nesterov": Maps("optim.nesterov", BOOL, True),
    "ns_steps": Maps("optim.newton_schulz_steps", POSITIVE, 5),
    "torch_adam": NoEffect(ONE_KERNEL, BOOL, False),
    "adam_w_mode": NotBuilt("weight decay as a part of the gradient", BOOL, (True,)),
    "fp32_optimizer_states": NotBuilt("optimizer state of less than fp32", BOOL, (True,)),
}


def _refused(feature: str, instead: str = "") -> Choice:
    return Choice({}, feature, instead)


TORCH = ("ASGD", "Adadelta", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam")
COMPRESSED = "AdamW takes its place without compressed traffic."

OPTIMIZER = Variants(
    "optim.name",
    {
        "Adam": Choice(ADAM),
        "AdamW": Choice(ADAM),
        "Lion": Choice(LION),
        "SGD": Choice(SGD),
        "Adafactor": Choice(ADAFACTOR),
        "Muon": Choice(MUON),
        "Adagrad": _refused("Adagrad"),
        "Lamb": _refused("LAMB"),
        "MuAdam": _refused("muP (MuAdam)"),
        "MuAdamW": _refused("muP (MuAdamW)"),
        "MuSGD": _refused("muP (MuSGD)"),
        "OneBitAdam": _refused("1-bit Adam", COMPRESSED),
        "ZeroOneAdam": _refused("0/1 Adam", COMPRESSED),
        "OneBitLamb": _refused("1-bit LAMB", COMPRESSED),
        **{name: _refused(f"torch's {name}", "Give it to initialize(optimizer=...).") for name in TORCH},
    },
    {"legacy_fusion": NoEffect(ONE_KERNEL, BOOL, False)},
)

NAMES = {"Adam": "adamw", "AdamW": "adamw", "Lion": "lion", "SGD": "sgd", "Adafactor": "adafactor", "Muon": "muon"}
TYPE, PARAMS, CLIP = "optimizer.type", "optimizer.params.", "gradient_clipping"
BY_HAND = ("lr", "weight_decay", "torch_adam", "adam_w_mode", "muon_lr", "adam_lr")


def convert(found: Import, peak: str | None) -> None:
    """optim.name and what belongs to it, without the schedule.

    Args:
        peak: the key of the schedule that sets the learning rate in place of the optimizer's, if there is one.
    """
    kind = found.values.get(TYPE)
    found.put(TYPE, "optim.name", NAMES[kind] if kind else "client")
    clip: Any = found.get(CLIP)
    found.put(CLIP, "optim.clip_norm", clip or None, because="; 0 does not clip")
    if kind is None:
        return
    _convert_rate(found, kind, peak)
    _convert_decay(found, kind)
    choice = found.types["optimizer"]
    assert choice is not None
    for key, entry in choice.keys.items():
        if isinstance(entry, Maps) and key not in BY_HAND:
            found.put(PARAMS + key, entry.to, found.get(PARAMS + key))
    if kind == "Muon":
        found.result["optim"]["lr_adjust"] = "original"


def _convert_rate(found: Import, kind: str, peak: str | None) -> None:
    paths = [PARAMS + key for key in (("lr", "muon_lr", "adam_lr") if kind == "Muon" else ("lr",))]
    if peak is not None:
        for path in paths:
            found.idle(path, f"{peak} is the peak of the schedule")
        return
    rate = found.get(paths[0])
    if kind == "Muon":
        shared = rate if found.has(paths[0]) else None
        first, second = (found.get(path) or shared for path in paths[1:])
        rate = first or 0.02
        if rate != (second or 3e-4):
            found.refuse(
                paths[1],
                f"{rate:g} for matrices and {second or 3e-4:g} for the rest: two learning rates are not built yet."
                " Give lr alone.",
            )
        used = [path for path in paths if found.has(path)]
        for path in used[:-1]:
            found.idle(path, "the learning rates agree")
        found.put(used[-1] if used else paths[0], "optim.lr", rate)
        return
    found.put(paths[0], "optim.lr", rate)


def _convert_decay(found: Import, kind: str) -> None:
    path, torch_adam, decoupled = PARAMS + "weight_decay", PARAMS + "torch_adam", PARAMS + "adam_w_mode"
    decay = found.get(path)
    if kind in ("Adam", "AdamW"):
        coupled = kind == "Adam" and not found.get(decoupled)
        if found.get(torch_adam) and not found.has(path) and not coupled:
            decay = 0.01  # torch.optim.AdamW's default
        found.idle(torch_adam, ONE_KERNEL)
        if not coupled:
            found.idle(decoupled, f"{kind} means AdamW")
        elif decay:
            found.refuse(
                decoupled,
                "seen false with weight_decay: Adam with decay as a part of the gradient (L2) is not built yet."
                " Leave adam_w_mode out for AdamW, or set weight_decay to 0.",
            )
        else:
            found.idle(decoupled, "without weight_decay Adam and AdamW are the same")
    found.put(path, "optim.weight_decay", decay)
    if decay:
        # Ours spares norms, biases and embeddings; DeepSpeed's reaches all parameters of a group.
        found.result["optim"]["rules"] = [{"pattern": ".", "weight_decay": decay}]
