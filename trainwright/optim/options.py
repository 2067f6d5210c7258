"""What an optimizer is asked to be: plain frozen values, checked on construction, no torch objects inside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trainwright.base.errors import ConfigError
from trainwright.optim.parts import EMBEDDING_NAMES

__all__ = ["HALF_UPDATES", "NAMES", "OptimizerOptions", "Rule"]

NAMES = ("adamw", "sgd", "adafactor", "lion", "muon", "adamw_8bit")
HALF_UPDATES = ("master", "kahan", "stochastic")
ELEMENTWISE = ("adamw", "sgd", "lion", "adamw_8bit")

# AdamW's beta2 = 0.95 is the usual choice for language models since GPT-3 (2005.14165); Lion's are its paper's.
DEFAULT_BETAS = {"adamw": (0.9, 0.95), "adamw_8bit": (0.9, 0.95), "muon": (0.9, 0.95), "lion": (0.9, 0.99)}
DEFAULT_MOMENTUM = {"sgd": 0.9, "muon": 0.95}


@dataclass(frozen=True)
class Rule:
    """Treats some parameters differently: those of a part of the model, or those whose name a pattern finds.

    Args:
        pattern: regular expression over full parameter names (`re.search`), such as `r"\\.layers\\.[0-3]\\."`.
        part: "embeddings", "head", "layers", "layers.N", "layers.N-M" or "all_but_head", in place of a pattern.
        lr_scale: multiplies the learning rate of these parameters; None keeps it.
        weight_decay: replaces the weight decay, also where the default is no decay; None keeps it.
        freeze: these parameters are not trained at all.
    """

    pattern: str | None = None
    lr_scale: float | None = None
    weight_decay: float | None = None
    freeze: bool = False
    part: str | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.part is None):
            raise ConfigError("an optimizer rule has either a pattern or a part", hint="Rule(part='head', lr_scale=10)")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(
                f"optimizer rule {self.pattern!r} is not a regular expression: {error}",
                hint=r"write a dot of a name as '\.', and quote the pattern",
            ) from None
        _require(self.lr_scale is None or self.lr_scale >= 0, "lr_scale", self.lr_scale, "at least 0")
        _require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True)
class OptimizerOptions:
    """One optimizer for all parameters.

    Args:
        name: adamw, sgd, adafactor, lion, muon or adamw_8bit (muon trains embeddings, head and vectors with AdamW).
        lr: peak learning rate; a schedule multiplies it.
        betas: decay of the first and second average (adamw, muon's AdamW part) or Lion's two; None = the usual ones.
        eps: added to AdamW's denominator.
        momentum: of sgd (None = 0.9) and muon (None = 0.95).
        nesterov: look one step ahead of the momentum (sgd, muon); None = off for sgd, on for muon.
        weight_decay: decoupled (1711.05101), times the learning rate; for sgd the classic L2 term in the gradient.
        layer_decay: learning rates fall by this factor from layer to layer, from the head (1) to the embeddings
            (ELECTRA, 2003.10555); a rule's `lr_scale` multiplies what is left.
        rules: ordered; the first that is for a name decides; one that is for nothing is refused.
        freeze: parts of the model (see `Rule`) that are not trained, whatever the rules say.
        no_decay: names that do not decay beside all vectors (norms, biases): embeddings.
        adamw_only: muon leaves these matrices to AdamW: embeddings and output heads (Keller Jordan's rule).
        lr_adjust: of muon: `match_rms_adamw` gives updates the size of AdamW's, so one lr fits both (2502.16982);
            `original` is Keller Jordan's sqrt(max(1, rows/columns)), for lr near 0.02.
        newton_schulz_steps: iterations of muon's orthogonalisation.
        newton_schulz_dtype: `bfloat16`, `float32` or `auto` (bfloat16 where the hardware multiplies it).
        beta2_decay: adafactor's beta2 of step t is 1 - t ** this.
        update_clip: adafactor's updates are scaled down to this root mean square (`d` in 1804.04235).
        fused: use torch's fused kernels where the device has them.
        half_update: how half-precision parameters take in small updates: `master` (an fp32 copy), `kahan` (the part
            that rounding cut off, in bf16) or `stochastic` (random rounding); see `halves`. The last two are for bf16
            and for optimizers that look at each number by itself: adamw, adamw_8bit, sgd, lion.
        seed: of random rounding.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    rules: tuple[Rule, ...] = ()
    freeze: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = (EMBEDDING_NAMES,)
    adamw_only: tuple[str, ...] = (
        EMBEDDING_NAMES,
        r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|cls|embedding)(\.|$)",
    )
    lr_adjust: str = "match_rms_adamw"
    newton_schulz_steps: int = 5
    newton_schulz_dtype: str = "auto"
    beta2_decay: float = -0.8
    update_clip: float = 1.0
    fused: bool = True
    half_update: str = "master"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"unknown optimizer {self.name!r}", hint=f"choose one of {', '.join(NAMES)}")
        _require(math.isfinite(self.lr) and self.lr >= 0, "lr", self.lr, "a finite number of at least 0")
        _require(self.eps >= 0, "eps", self.eps, "at least 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0, at most 1")
        for beta in self.betas or ():
            _require(0 <= beta < 1, "betas", self.betas, "two numbers of at least 0 and below 1")
        _require(self.momentum is None or 0 <= self.momentum < 1, "momentum", self.momentum, "at least 0, below 1")
        _require(self.beta2_decay <= 0, "beta2_decay", self.beta2_decay, "at most 0")
        _require(self.update_clip >= 1, "update_clip", self.update_clip, "at least 1")
        _require(1 <= self.newton_schulz_steps < 100, "newton_schulz_steps", self.newton_schulz_steps, "1 to 99")
        _choose("lr_adjust", self.lr_adjust, ("match_rms_adamw", "original"))
        _choose("newton_schulz_dtype", self.newton_schulz_dtype, ("auto", "bfloat16", "float32"))
        _choose("half_update", self.half_update, HALF_UPDATES)
        if self.half_update != "master" and self.name not in ELEMENTWISE:
            raise ConfigError(
                f"optimizer {self.name} cannot update bf16 parameters by {self.half_update!r}",
                hint=f"use half_update master, or one of {', '.join(ELEMENTWISE)}",
            )
        if self.nesterov and self.name == "sgd" and self.resolved_momentum == 0:
            raise ConfigError("optimizer sgd: nesterov needs momentum above 0", hint="set momentum=0.9")

    @property
    def resolved_betas(self) -> tuple[float, float]:
        return self.betas if self.betas is not None else DEFAULT_BETAS.get(self.name, (0.9, 0.95))

    @property
    def resolved_momentum(self) -> float:
        return self.momentum if self.momentum is not None else DEFAULT_MOMENTUM.get(self.name, 0.0)


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"optimizer option {key} is {value!r}, expected {expected}")


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"optimizer option {key} is {value!r}", hint=f"choose one of {', '.join(choices)}")
