"""A plan: every "auto" of a recipe as a number with its reason, and what the run is predicted to cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainwright.base.text import human_bytes, human_count, human_duration
from trainwright.comm.layout import Layout

__all__ = ["Decision", "Plan", "Prediction"]


@dataclass(frozen=True)
class Decision:
    """One resolved value. `key` is the dotted recipe key; `value` is a YAML value."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Prediction:
    """What the run will cost.

    Attributes:
        tokens_per_second: tokens that losses are means over, per second in steady state.
        step_seconds: seconds of one optimizer step.
        total_seconds: seconds of all steps, without compiling, evaluating and saving.
        memory: bytes at the peak of a step by kind, and their total.
        wire: bytes that one rank sends per step, by axis of the layout.
    """

    tokens_per_second: float
    step_seconds: float
    total_seconds: float
    memory: dict[str, int]
    wire: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before anything is built.

    Attributes:
        decisions: in the order they were taken; later ones rest on earlier ones.
        steps: optimizer steps of the run.
        batch_rows, micro_rows: rows per optimizer step over all ranks, and per forward pass of one rank.
        layout: how the state of training is divided over the ranks.
        tokens: trained tokens of the whole run.
        parameters: of the model, without adapters.
        flops_per_token: that the run computes for a trained token, forward and backward.
        peak_flops: measured matmul rate of the run's compute type on all ranks together, against which MFU is counted.
        machine, data: the facts it rests on.
        prediction: what it will cost.
        trains: which of the parameters are trained, where not all are.
    """

    decisions: tuple[Decision, ...]
    steps: int
    batch_rows: int
    micro_rows: int
    tokens: int
    parameters: int
    flops_per_token: float
    peak_flops: float
    machine: dict[str, Any]
    data: dict[str, Any]
    prediction: Prediction
    layout: Layout = field(default_factory=lambda: Layout(1, 0, 1))
    trains: str | None = None

    @property
    def flops_per_step(self) -> float:
        """FLOPs of one optimizer step on all ranks together."""
        return self.flops_per_token * self.tokens / self.steps

    @property
    def rank_rows(self) -> int:
        """Rows of one optimizer step on one rank, and on those that work on the same rows with it."""
        return self.batch_rows // self.layout.rows

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.rank_rows // self.micro_rows

    def updates(self) -> dict[str, tuple[Any, str]]:
        """The decisions in the form that `LoadedRecipe.resolve` takes."""
        return {decision.key: (decision.value, decision.reason) for decision in self.decisions}

    def with_decisions(self, earlier: tuple[Decision, ...]) -> Plan:
        """The same plan with decisions that were taken before it in front."""
        return replace(self, decisions=earlier + self.decisions)

    def _sent(self) -> str:
        """Bytes on the wire by what they are for."""
        names = {"state": "gradients and state", "expert": "tokens to experts"}
        return ", ".join(f"{names.get(axis, axis)} {human_bytes(size)}" for axis, size in self.prediction.wire.items())

    def to_dict(self) -> dict[str, Any]:
        """JSON form, saved as `plan.json`."""
        return asdict(self)

    def describe(self) -> str:
        """What would run and why, in lines for a person."""
        guess = "about " if self.data["estimated"] else ""
        counted = self.data["counted"]
        prediction = self.prediction
        parts = [f"{kind} {human_bytes(size)}" for kind, size in prediction.memory.items() if kind != "total"]
        lines = [
            f"machine   {self.machine['name']}, {self.machine['cores']} cores,"
            f" {human_bytes(self.machine['memory_bytes'])}; measured matmul peak"
            f" {', '.join(f'{name} {rate / 1e12:.2f} TFLOP/s' for name, rate in self.machine['peak'].items())}",
            f"data      {guess}{human_count(self.data['train_rows'] * self.data['trained_per_row'])} training {counted}"
            f" in {self.data['train_rows']:,} rows of {self.data['sequence_length']},"
            f" {guess}{self.data['validation_rows']:,} validation rows, vocabulary {self.data['vocab_size']:,}",
            f"model     {human_count(self.parameters)} parameters,"
            f" {self.flops_per_token / 1e6:,.0f} MFLOP per trained {counted.removesuffix('s')}",
            *([f"trains    {self.trains}"] if self.trains is not None else []),
            f"run       {self.steps:,} steps x {self.batch_rows} rows = {human_count(self.tokens)} trained {counted}",
            *([f"ranks     {self.layout.describe()}"] if self.layout.world > 1 else []),
            f"predicted {human_count(prediction.tokens_per_second)} {counted}/s,"
            f" {human_duration(prediction.total_seconds)} of training,"
            f" {human_bytes(prediction.memory['total'])} of memory ({', '.join(parts)})",
            *([f"sends     {self._sent()} per step from each rank"] if prediction.wire else []),
            "decided",
        ]
        width = max((len(d.key) + len(str(d.value)) for d in self.decisions), default=0) + 3
        for decision in self.decisions:
            lines.append(f"  {f'{decision.key} = {decision.value}':<{width}}  {decision.reason}")
        return "\n".join(lines)
