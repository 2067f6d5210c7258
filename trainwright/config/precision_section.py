"""`precision`: the number formats of weights and matrix products. A word, or a section with its details."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Tag

from trainwright.config.fields import Listed, Pattern, Real, Whole, Words
from trainwright.config.section import Section, by_name, variant_of

__all__ = [
    "PRECISIONS",
    "AutoPrecision",
    "BF16Precision",
    "BF16PurePrecision",
    "FP8Precision",
    "FP16Precision",
    "FP32Precision",
    "PrecisionName",
    "PrecisionSection",
]

PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "bf16_pure", "fp8"]
PRECISION_NAMES: tuple[str, ...] = ("auto", "fp32", "bf16", "fp16", "bf16_pure", "fp8")


class _Precision(Section):
    """Number formats of weights and matrix products."""

    elsewhere: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("loss_scale", "initial_scale", "window", "hysteresis", "min_scale"), "name: fp16"),
        "update": "name: bf16_pure",
        "recipe": "name: fp8",
    }

    name: Annotated[PrecisionName, Words(PRECISION_NAMES)] = "auto"
    """fp32; bf16, fp16, fp8: fp32 weights and products in that format; bf16_pure: bf16 weights too; auto by device."""
    keep_fp32: Annotated[tuple[str, ...], Listed((), Pattern(), empty=True)] = ()
    """Regular expressions searched in names of modules; what is inside stays and computes in fp32."""


class AutoPrecision(_Precision):
    """bf16 where the device is fast in it, else fp32."""


class FP32Precision(_Precision):
    """Everything in fp32."""


class BF16Precision(_Precision):
    """fp32 weights, bf16 products."""


class FP16Precision(_Precision):
    """fp32 weights, fp16 products, and a loss scale that keeps small gradients above zero (arXiv 1710.03740)."""

    loss_scale: Annotated[float | Literal["dynamic"], Real(("dynamic",), above=0)] = "dynamic"
    """Factor of the loss before backward: dynamic follows the overflows; a number stays."""
    initial_scale: Annotated[float, Real(above=0)] = 65536.0
    """Dynamic loss scale of the first step."""
    window: Annotated[int, Whole(minimum=1)] = 1000
    """Steps without overflow after which the dynamic loss scale doubles."""
    hysteresis: Annotated[int, Whole(minimum=1)] = 2
    """Overflows after which the dynamic loss scale halves; each overflow skips its step in any case."""
    min_scale: Annotated[float, Real(above=0)] = 1.0
    """The dynamic loss scale does not fall below this."""

    def without_effect(self) -> dict[str, str]:
        if self.loss_scale == "dynamic":
            return {}
        fixed = "precision.loss_scale is a number"
        return dict.fromkeys(("initial_scale", "window", "hysteresis", "min_scale"), fixed)

    def problems(self) -> Any:
        if self.loss_scale == "dynamic" and self.min_scale > self.initial_scale:
            yield "min_scale", f"at most precision.initial_scale, which is {self.initial_scale:g}"


class BF16PurePrecision(_Precision):
    """bf16 weights and gradients."""

    update: Annotated[Literal["master", "kahan", "stochastic"], Words(("master", "kahan", "stochastic"))] = "master"
    """How updates below bf16's spacing survive: an fp32 copy, Kahan's compensation, or stochastic rounding."""


class FP8Precision(_Precision):
    """fp32 weights, fp8 products through torchao, on devices that multiply fp8."""

    recipe: Annotated[Literal["tensorwise", "rowwise"], Words(("tensorwise", "rowwise"))] = "tensorwise"
    """One scale for each tensor (faster), or for each row (closer to bf16)."""


PRECISIONS: dict[str, type[_Precision]] = {
    "auto": AutoPrecision,
    "fp32": FP32Precision,
    "bf16": BF16Precision,
    "fp16": FP16Precision,
    "bf16_pure": BF16PurePrecision,
    "fp8": FP8Precision,
}

_Precisions: TypeAlias = Annotated[
    Annotated[AutoPrecision, Tag("<auto>")]
    | Annotated[FP32Precision, Tag("<fp32>")]
    | Annotated[BF16Precision, Tag("<bf16>")]
    | Annotated[FP16Precision, Tag("<fp16>")]
    | Annotated[BF16PurePrecision, Tag("<bf16_pure>")]
    | Annotated[FP8Precision, Tag("<fp8>")],
    Discriminator(
        lambda value: variant_of(value, PRECISIONS, "auto"),
        custom_error_type="expected",
        custom_error_message="auto, fp32, bf16, fp16, bf16_pure, fp8, or a section such as {name: fp16, window: 1000}",
    ),
]

PrecisionSection: TypeAlias = Annotated[
    _Precisions, BeforeValidator(by_name, json_schema_input_type=PrecisionName | _Precisions)
]
