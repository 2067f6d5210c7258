"""`train`: for how long, in what batches, and what happens when it goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from trainwright.base.units import Count, Duration
from trainwright.config.fields import Auto, Listed, Name, Real, Truth, Unit, Whole, Words
from trainwright.config.optim_section import PART
from trainwright.config.section import Section

__all__ = ["BUDGETS", "EMASection", "EarlyStoppingSection", "SpikeSection", "TrainSection"]

BUDGETS = ("steps", "tokens", "epochs", "time")


class EarlyStoppingSection(Section):
    """Stop when evaluations no longer get better."""

    metric: Annotated[str, Name(what_it_is="auto, loss, or the name of one of the task's metrics")] = "auto"
    """What is compared: auto is the task's own metric (F1 of entities, accuracy, ...), else the validation loss."""
    patience: Annotated[int, Whole(minimum=1)] = 5
    """Evaluations without improvement after which training stops."""
    min_delta: Annotated[float, Real(minimum=0)] = 0.0
    """Improvements up to this size do not count, in units of the metric."""


class EMASection(Section):
    """Exponential moving average of the weights, evaluated and exported in place of the last ones."""

    decay: Annotated[float, Real(above=0, below=1)] = 0.999
    """Weight of the old average at each step."""


class SpikeSection(Section):
    """When the loss counts as a spike."""

    sigma: Annotated[float, Real(above=0)] = 6.0
    """Robust standard deviations (from the median absolute deviation) above the median of recent steps."""
    window: Annotated[int, Whole(minimum=32)] = 128
    """Accepted steps that are remembered; judging starts after the first 32."""


class TrainSection(Section):
    """How long, in what batches, how checked, and what happens when it goes wrong."""

    steps: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Budget: optimizer steps. One budget at most: steps, tokens, epochs or time."""
    tokens: Annotated[Count | Auto | None, Unit((None, "auto"), Count, minimum=1)] = None
    """Budget: trained tokens; auto follows the model's size and the data's. The default when no budget is given."""
    epochs: Annotated[float | None, Real((None,), above=0)] = None
    """Budget: passes over the training rows."""
    time: Annotated[Duration | None, Unit((None,), only="seconds")] = None
    """Budget: about so much training time; the planner turns it into steps before anything is built."""
    batch_tokens: Annotated[Count | Auto, Unit(("auto",), Count, minimum=1)] = "auto"
    """Tokens of one optimizer step: a whole number of rows of data.sequence_length."""
    micro_batch: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Rows of one forward pass; it divides the rows of a step and cannot change the result."""
    eval_every: Annotated[Duration | Literal["auto", "never"], Unit(("auto", "never"))] = "auto"
    """How often the validation loss is taken."""
    eval_tokens: Annotated[Count | Literal["auto", "all"], Unit(("auto", "all"), Count, minimum=1)] = "auto"
    """Validation tokens of one evaluation, always the same ones."""
    eval_answers: Annotated[int | Literal["all"], Whole(("all",), minimum=0)] = 32
    """Records that an evaluation during training writes answers for, where the task writes; the end has all."""
    seed: Annotated[int, Whole()] = 0
    """Seeds initialisation, order of rows and dropout."""
    compile: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """torch.compile for each block; auto when a compiler is there and the run is long enough to earn it back."""
    deterministic: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """Only deterministic kernels: the same run gives the same bits. auto is true on the CPU, false elsewhere."""
    threads: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """CPU threads of each process; auto is OMP_NUM_THREADS where it is set, else its share of the usable cores."""
    early_stopping: EarlyStoppingSection | None = None
    """Stop when evaluations no longer get better; null trains the whole budget."""
    export: Annotated[Literal["auto", "best", "last"], Words(("auto", "best", "last"))] = "auto"
    """Which weights become model/: those of the best evaluation or of the last step; auto is best where
    checkpoint.keep_best keeps them."""
    freeze: Annotated[tuple[str, ...], Listed((), PART, empty=True)] = ()
    """Parts that are not trained: embeddings, head, layers.N, layers.N-M, layers, or all_but_head."""
    neftune_alpha: Annotated[float | None, Real((None,), above=0)] = None
    """Uniform noise on the embedded tokens in training, scaled by alpha / sqrt(length * width) (NEFTune, arXiv
    2310.05914, which uses 5 to 15); null adds none."""
    ema: EMASection | None = None
    """Exponential moving average of the weights; null keeps none."""
    on_nan: Annotated[Literal["skip", "stop"], Words(("skip", "stop"))] = "skip"
    """A loss or gradient that is NaN or infinite: skip the step, or save and stop."""
    on_spike: Annotated[Literal["ignore", "skip", "stop"], Words(("ignore", "skip", "stop"))] = "ignore"
    """A loss or gradient norm far above the recent ones: train on it, skip the step, or save and stop."""
    spike: SpikeSection = SpikeSection()
    """What counts as a spike."""
    max_skips: Annotated[int, Whole(minimum=1)] = 10
    """Skipped steps in a row after which training stops all the same."""

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if all(given.get(budget) is None for budget in BUDGETS):
            given["tokens"] = "auto"
        return given

    @classmethod
    def raw_problems(cls, given: Mapping[str, Any]) -> Any:
        budgets = [budget for budget in BUDGETS if given.get(budget) is not None]
        for budget in budgets[1:]:
            yield budget, f"one budget only, and train.{budgets[0]} is given too"

    def without_effect(self) -> dict[str, str]:
        idle = {}
        if self.on_spike == "ignore":
            idle["spike"] = "train.on_spike is ignore"
        if "skip" not in (self.on_nan, self.on_spike):
            idle["max_skips"] = "neither train.on_nan nor train.on_spike is skip"
        return idle

    def problems(self) -> Any:
        if self.eval_every == "never":
            if self.early_stopping is not None:
                yield "early_stopping", "null: train.eval_every is never"
            if self.export == "best":
                yield "export", "auto or last: train.eval_every is never"
