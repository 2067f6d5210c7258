"""`adapter`: train a small addition to a frozen model instead of the model. A word, or a section with its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue

from trainwright.config.fields import Listed, Name, Pattern, Real, Whole, Words
from trainwright.config.section import Section, by_name

__all__ = ["ADAPTER_NAMES", "Adapter", "AdapterSection"]

AdapterName = Literal["lora", "rslora", "dora", "qlora", "peft"]
ADAPTER_NAMES: tuple[AdapterName, ...] = ("lora", "rslora", "dora", "qlora", "peft")

AdapterBase = Literal["auto", "as_is", "fp32", "bf16", "fp16", "nf4"]

_OWN = ("rank", "alpha", "dropout", "targets", "base", "path")


class AdapterSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen linears."""

    name: Annotated[AdapterName, Words(ADAPTER_NAMES)] = "lora"
    """lora; rslora: scaled by the root of the rank (arXiv 2312.03732); dora: magnitude and direction apart (arXiv
    2402.09353); qlora: lora over a base in 4-bit NormalFloat (arXiv 2305.14314); peft: any method of peft."""
    rank: Annotated[int, Whole(minimum=1)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Real(above=0)] = 32.0
    """The addition is scaled by alpha / rank (rslora: alpha / root of rank)."""
    dropout: Annotated[float, Real(minimum=0, below=1)] = 0.0
    """Dropout of the adapter's input."""
    targets: Annotated[tuple[str, ...] | None, Listed((None,), Pattern())] = None
    """Regular expressions searched in names of linears; null takes all linears of the blocks, never the head."""
    train: Annotated[tuple[str, ...], Listed((), Pattern(), empty=True)] = ()
    """Regular expressions searched in names of parameters that are trained as they are beside the adapters, such as
    norm or embed_tokens. The head of a task always is."""
    base: Annotated[AdapterBase, Words(("auto", "as_is", "fp32", "bf16", "fp16", "nf4"))] = "auto"
    """How frozen weights beside adapters are held: auto is nf4 for qlora, else the type of matrix products."""
    path: Annotated[str | None, Name((None,), what_it_is="a folder")] = None
    """A folder of adapters, ours or peft's, to go on from; rank, alpha, name and targets must be its own."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of peft's own configuration, such as {peft_type: LOHA, r: 8, target_modules: [q_proj, v_proj]}."""

    def problems(self) -> Any:
        if self.name == "qlora" and self.base not in ("auto", "nf4"):
            yield "base", "auto or nf4 beside name: qlora; name: lora takes any base"
        if self.name == "peft" and not isinstance(self.config.get("peft_type"), str):
            yield "config", "a field `peft_type` (IA3, VERA, OFT, ...) among the fields of adapter.config"

    def without_effect(self) -> Mapping[str, str]:
        if self.name == "peft":
            return dict.fromkeys(_OWN, "adapter.config says it for name: peft")
        return {"config": "it is for name: peft"}


Adapter: TypeAlias = Annotated[
    AdapterSection | None, BeforeValidator(by_name, json_schema_input_type=str | AdapterSection | None)
]
