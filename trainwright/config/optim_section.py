"""`optim`: the optimizer, its schedule, and rules for groups of parameters. Each optimizer has only its own keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Tag

from trainwright.base.units import Duration
from trainwright.config.fields import Auto, Fraction, Listed, Name, Pattern, Real, Truth, Whole, Words
from trainwright.config.section import Section, by_name, variant_of

__all__ = [
    "OPTIMIZERS",
    "PART",
    "SCHEDULES",
    "SGD",
    "Adafactor",
    "AdamW",
    "ConstantSchedule",
    "CosineSchedule",
    "CyclicalSchedule",
    "InverseSqrtSchedule",
    "LRRangeTestSchedule",
    "LinearSchedule",
    "Lion",
    "Muon",
    "OneCycleDecaySchedule",
    "OneCycleSchedule",
    "OptimSection",
    "ParameterRule",
    "PolynomialSchedule",
    "ScheduleSection",
    "WSDSchedule",
    "WarmupDecaySchedule",
]

ScheduleName = Literal[
    "constant",
    "linear",
    "cosine",
    "wsd",
    "one_cycle",
    "cyclical",
    "inverse_sqrt",
    "polynomial",
    "warmup_decay",
    "one_cycle_decay",
    "lr_range_test",
]
SCHEDULE_NAMES: tuple[str, ...] = (
    "constant",
    "linear",
    "cosine",
    "wsd",
    "one_cycle",
    "cyclical",
    "inverse_sqrt",
    "polynomial",
    "warmup_decay",
    "one_cycle_decay",
    "lr_range_test",
)
OptimizerName = Literal["adamw", "sgd", "adafactor", "lion", "muon"]
OPTIMIZER_NAMES: tuple[str, ...] = ("adamw", "sgd", "adafactor", "lion", "muon")


class _Schedule(Section):
    """The learning rate over the run, as a multiplier of optim.lr."""

    elsewhere: ClassVar[dict[str, str]] = {
        "min_ratio": "the schedules that fall: linear, cosine, wsd, one_cycle, cyclical, polynomial, warmup_decay",
        "decay": "name: wsd or warmup_decay",
        "shape": "name: wsd or one_cycle",
        "start": "name: one_cycle or one_cycle_decay",
        **dict.fromkeys(("warmup_start", "warmup_shape"), "name: warmup_decay"),
        **dict.fromkeys(
            ("fall_steps", "rise_stairs", "fall_stairs", "decay_steps", "decay_rate"), "name: one_cycle_decay"
        ),
        **dict.fromkeys(("step_size", "step_rate", "staircase"), "name: lr_range_test"),
        "restarts": "name: cosine",
        "cycle_steps": "name: cyclical",
        "mode": "name: cyclical",
        "power": "name: polynomial",
        "timescale": "name: inverse_sqrt",
    }

    name: Annotated[ScheduleName, Words(SCHEDULE_NAMES)] = "wsd"
    """The shape of the learning rate over the run."""
    warmup: Annotated[Duration | float | Auto, Fraction(("auto",))] = "auto"
    """Linear rise at the start: a duration, or a fraction of the run; 0 is none."""


class ConstantSchedule(_Schedule):
    """optim.lr all along."""


class InverseSqrtSchedule(_Schedule):
    """Falls with the square root of the step count after the warm-up (arXiv 1706.03762)."""

    timescale: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Steps after the warm-up at which 1/sqrt(2) is reached; null is the length of the warm-up."""


class _Falling(_Schedule):
    min_ratio: Annotated[float, Real(minimum=0, maximum=1)] = 0.0
    """Lowest learning rate as a fraction of optim.lr."""


class LinearSchedule(_Falling):
    """A straight line down to min_ratio."""


class CosineSchedule(_Falling):
    """Half a cosine down to min_ratio (arXiv 1608.03983)."""

    restarts: Annotated[int, Whole()] = 0
    """Jumps back to the full learning rate on the way down."""


class OneCycleSchedule(_Falling):
    """Up during the warm-up, then down (Smith, arXiv 1708.07120); numbers of torch's OneCycleLR."""

    min_ratio: Annotated[float, Real(minimum=0, maximum=1)] = 4e-6
    """Lowest learning rate as a fraction of optim.lr."""
    start: Annotated[float, Real(minimum=0, maximum=1)] = 0.04
    """Learning rate of the first step as a fraction of optim.lr."""
    shape: Annotated[Literal["cosine", "linear"], Words(("cosine", "linear"))] = "cosine"
    """Curve of the rise and the fall."""


class WSDSchedule(_Falling):
    """Warm-up, stable, decay: constant until the last part of the run, then down (MiniCPM, arXiv 2404.06395)."""

    decay: Annotated[float, Real(above=0, maximum=1)] = 0.2
    """Fraction of the run, at its end, over which the learning rate falls."""
    shape: Annotated[Literal["sqrt", "linear", "cosine"], Words(("sqrt", "linear", "cosine"))] = "sqrt"
    """Curve of the fall; sqrt is 1 - sqrt(progress), the best of those compared in arXiv 2405.18392."""


class CyclicalSchedule(_Falling):
    """Triangles between min_ratio and 1, again and again (Smith, arXiv 1506.01186)."""

    cycle_steps: Annotated[int, Whole(minimum=2)]
    """Steps of one triangle, up and down."""
    mode: Annotated[Literal["triangular", "triangular2"], Words(("triangular", "triangular2"))] = "triangular"
    """triangular: all of one height; triangular2: half the height each time."""


class PolynomialSchedule(_Falling):
    """Down to min_ratio as a power of what is left of the run."""

    power: Annotated[float, Real(above=0)] = 1.0
    """Exponent: 1 is a straight line, larger falls earlier."""


class WarmupDecaySchedule(_Falling):
    """DeepSpeed's WarmupLR, WarmupDecayLR and WarmupCosineLR, update by update."""

    warmup_start: Annotated[float, Real(minimum=0, maximum=1)] = 0.0
    """Learning rate of the first step as a fraction of optim.lr."""
    warmup_shape: Annotated[Literal["log", "linear"], Words(("log", "linear"))] = "log"
    """Curve of the rise; log is steep at first."""
    decay: Annotated[Literal["none", "linear", "cosine"], Words(("none", "linear", "cosine"))] = "none"
    """Curve of the fall after the warm-up; none stays at optim.lr."""

    def without_effect(self) -> dict[str, str]:
        return {"min_ratio": "optim.schedule.decay is none"} if self.decay == "none" else {}


class OneCycleDecaySchedule(_Schedule):
    """Up during the warm-up, down again, then ever lower: DeepSpeed's OneCycle (Smith, arXiv 1803.09820)."""

    start: Annotated[float, Real(minimum=0, maximum=1)] = 0.0
    """Learning rate at both ends of the cycle as a fraction of optim.lr."""
    fall_steps: Annotated[int | None, Whole((None,))] = None
    """Steps of the way down; null is as many as of the way up."""
    rise_stairs: Annotated[int, Whole()] = 0
    """Rise in that many steps of equal width; 0 is a line."""
    fall_stairs: Annotated[int, Whole()] = 0
    """Fall in that many steps of equal width; 0 is a line."""
    decay_steps: Annotated[int | None, Whole((None,), minimum=1)] = None
    """After the cycle the learning rate is divided by 1 + decay_rate * steps / decay_steps; null does not decay."""
    decay_rate: Annotated[float, Real(minimum=0)] = 0.0
    """How much the divisor after the cycle grows in decay_steps."""

    def problems(self) -> Any:
        if (self.decay_steps is None) != (self.decay_rate == 0):
            yield "decay_steps", "both decay_steps and decay_rate, or neither"


class LRRangeTestSchedule(_Schedule):
    """From optim.lr up and up, to see which learning rate is too high (Smith, arXiv 1803.09820)."""

    warmup: Annotated[Duration | float, Fraction()] = 0.0
    """Linear rise to optim.lr before the test: a duration, or a fraction of the run; 0 is none."""
    step_size: Annotated[int, Whole(minimum=1)] = 2000
    """Steps in which the learning rate grows by step_rate times optim.lr."""
    step_rate: Annotated[float, Real(minimum=0)] = 1.0
    """Growth in step_size steps as a multiple of optim.lr."""
    staircase: Annotated[bool, Truth()] = False
    """Grow once every step_size steps, not a little at each."""


SCHEDULES: dict[str, type[_Schedule]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "wsd": WSDSchedule,
    "one_cycle": OneCycleSchedule,
    "cyclical": CyclicalSchedule,
    "inverse_sqrt": InverseSqrtSchedule,
    "polynomial": PolynomialSchedule,
    "warmup_decay": WarmupDecaySchedule,
    "one_cycle_decay": OneCycleDecaySchedule,
    "lr_range_test": LRRangeTestSchedule,
}


_Schedules: TypeAlias = Annotated[
    Annotated[ConstantSchedule, Tag("<constant>")]
    | Annotated[LinearSchedule, Tag("<linear>")]
    | Annotated[CosineSchedule, Tag("<cosine>")]
    | Annotated[WSDSchedule, Tag("<wsd>")]
    | Annotated[OneCycleSchedule, Tag("<one_cycle>")]
    | Annotated[CyclicalSchedule, Tag("<cyclical>")]
    | Annotated[InverseSqrtSchedule, Tag("<inverse_sqrt>")]
    | Annotated[PolynomialSchedule, Tag("<polynomial>")]
    | Annotated[WarmupDecaySchedule, Tag("<warmup_decay>")]
    | Annotated[OneCycleDecaySchedule, Tag("<one_cycle_decay>")]
    | Annotated[LRRangeTestSchedule, Tag("<lr_range_test>")],
    Discriminator(
        lambda value: variant_of(value, SCHEDULES, "wsd"),
        custom_error_type="expected",
        custom_error_message="the name of a schedule or {name: ..., warmup: ...}",
    ),
]


ScheduleSection: TypeAlias = Annotated[_Schedules, BeforeValidator(by_name, json_schema_input_type=str | _Schedules)]


PART = Name(
    what_it_is="embeddings, head, layers, layers.N, layers.N-M or all_but_head",
    pattern=r"embeddings|head|all_but_head|layers(\.\d+(-\d+)?)?",
)
"""A part of a model by a name that fits every family."""


class ParameterRule(Section):
    """Other settings for some parameters: those of a part of the model, or those whose name matches."""

    part: Annotated[str | None, replace(PART, words=(None,))] = None
    """A part of the model: embeddings, head, layers.N, layers.N-M (both included), layers, or all_but_head."""
    pattern: Annotated[str | None, Pattern((None,))] = None
    """Regular expression searched in parameter names; one that matches none is an error."""
    lr_scale: Annotated[float | None, Real((None,), minimum=0)] = None
    """Multiplies the learning rate; null keeps it."""
    weight_decay: Annotated[float | None, Real((None,), minimum=0)] = None
    """Replaces the weight decay, also where there is none by default; null keeps it."""
    freeze: Annotated[bool, Truth()] = False
    """Do not train these parameters at all."""

    def problems(self) -> Any:
        if self.part is None and self.pattern is None:
            yield "pattern", "a regular expression over names of parameters, or part: embeddings, head, layers.0-3, ..."
        if self.part is not None and self.pattern is not None:
            yield "pattern", "no pattern beside a part: a rule has one of the two"
        if self.lr_scale is None and self.weight_decay is None and not self.freeze:
            key = "pattern" if self.part is None else "part"
            yield key, "at least one of lr_scale, weight_decay, freeze: this rule changes nothing"
        if self.freeze and (self.lr_scale is not None or self.weight_decay is not None):
            yield "freeze", "false beside lr_scale or weight_decay: frozen parameters have neither"


class _Optimizer(Section):
    """The optimizer and what drives it."""

    elsewhere: ClassVar[dict[str, str]] = {
        "betas": "name: adamw, lion or muon",
        "eps": "name: adamw or muon",
        "momentum": "name: sgd or muon",
        "nesterov": "name: sgd or muon",
        "beta2_decay": "name: adafactor",
        "update_clip": "name: adafactor",
        "lr_adjust": "name: muon",
        "newton_schulz_steps": "name: muon",
    }

    name: Annotated[OptimizerName, Words(OPTIMIZER_NAMES)] = "adamw"
    """The optimizer."""
    lr: Annotated[float | Auto, Real(("auto",), above=0)] = "auto"
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Annotated[float | Auto, Real(("auto",), minimum=0)] = "auto"
    """Weight decay of matrices; norms, biases and embeddings have none unless a rule says so. auto is 0.1 for a model
    from scratch, 0.01 for a pretrained one."""
    layer_decay: Annotated[float, Real(above=0, maximum=1)] = 1.0
    """Learning rates fall by this factor from layer to layer, from the head (1) down to the embeddings (ELECTRA, arXiv
    2003.10555, uses 0.8 to 0.9); 1 keeps them equal."""
    clip_norm: Annotated[float | None, Real((None,), above=0)] = 1.0
    """Largest norm of the whole gradient; null does not clip."""
    schedule: ScheduleSection = WSDSchedule()
    """The learning rate over the run."""
    rules: tuple[ParameterRule, ...] = ()
    """Ordered exceptions by parameter name; the first that matches decides."""


Betas: TypeAlias = Annotated[tuple[float, float], Listed((), Real(minimum=0, below=1), 2)]


class AdamW(_Optimizer):
    """AdamW (arXiv 1711.05101)."""

    betas: Betas = (0.9, 0.95)
    """Decay of the averages of gradient and squared gradient."""
    eps: Annotated[float, Real(minimum=0)] = 1e-8
    """Added to the denominator."""


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: Annotated[float, Real(minimum=0, below=1)] = 0.9
    """Decay of the average of gradients."""
    nesterov: Annotated[bool, Truth()] = False
    """Look one step ahead of the momentum."""

    def problems(self) -> Any:
        if self.nesterov and self.momentum == 0:
            yield "nesterov", "false: optim.momentum is 0"


class Adafactor(_Optimizer):
    """Adafactor (arXiv 1804.04235): rows and columns of squared gradients in place of all of them."""

    beta2_decay: Annotated[float, Real(maximum=0)] = -0.8
    """The average of squared gradients at step t decays by 1 - t ** this."""
    update_clip: Annotated[float, Real(minimum=1)] = 1.0
    """Updates are scaled down to this root mean square."""


class Lion(_Optimizer):
    """Lion (arXiv 2302.06675)."""

    betas: Betas = (0.9, 0.99)
    """Weight of the average in the update, and its decay."""


class Muon(_Optimizer):
    """Muon for matrices, AdamW for embeddings, head, norms and biases."""

    momentum: Annotated[float, Real(minimum=0, below=1)] = 0.95
    """Decay of the average of gradients."""
    nesterov: Annotated[bool, Truth()] = True
    """Look one step ahead of the momentum."""
    betas: Betas = (0.9, 0.95)
    """Decay of AdamW's averages, for the parameters that Muon does not train."""
    eps: Annotated[float, Real(minimum=0)] = 1e-8
    """Added to AdamW's denominator, for the parameters that Muon does not train."""
    lr_adjust: Annotated[Literal["match_rms_adamw", "original"], Words(("match_rms_adamw", "original"))] = (
        "match_rms_adamw"
    )
    """match_rms_adamw: updates of AdamW's size, one lr fits both (arXiv 2502.16982); original: for lr near 0.02."""
    newton_schulz_steps: Annotated[int, Whole(minimum=1)] = 5
    """Iterations of the orthogonalisation."""


OPTIMIZERS: dict[str, type[_Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
}

OptimSection: TypeAlias = Annotated[
    Annotated[AdamW, Tag("<adamw>")]
    | Annotated[SGD, Tag("<sgd>")]
    | Annotated[Adafactor, Tag("<adafactor>")]
    | Annotated[Lion, Tag("<lion>")]
    | Annotated[Muon, Tag("<muon>")],
    Discriminator(
        lambda value: variant_of(value, OPTIMIZERS, "adamw"),
        custom_error_type="expected",
        custom_error_message="a section such as {name: adamw, lr: auto}",
    ),
]
