"""Cost model: bytes and seconds of a run, as pure functions of plain numbers.

Constants that were measured carry the machine they were measured on. The prediction stands beside the measurement in
every run's `run.json`, so an error here is seen, not hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainwright.comm.layout import PipelineLayout
from trainwright.parallel.pipeline.predict import bubble_share
from trainwright.planner.division import Division
from trainwright.planner.facts import MachineFacts, ModelFacts
from trainwright.planner.memory import MemorySettings, predict_rank_memory

__all__ = ["MemoryPrediction", "pipeline_share", "predict_memory", "predict_tokens_per_second", "utilisation"]

# Share of the measured matmul peak that a whole training step reaches, by (device kind, compiled).
# CPU, compiled: measured on 2 cores of an AMD EPYC 9004: 0.63 for a llama of 5M parameters, 0.73 for 34M
# (docs/benchmarks.md). CPU, eager, and CUDA (published dense single-GPU runs: 0.35-0.5): estimates.
_UTILISATION = {("cpu", True): 0.65, ("cpu", False): 0.35, ("cuda", True): 0.45, ("cuda", False): 0.35}
_DEFAULT_UTILISATION = 0.25


def utilisation(machine: MachineFacts, *, compiled: bool) -> float:
    """Expected share of the measured matmul peak, 0 to 1."""
    return _UTILISATION.get((machine.kind, compiled), _DEFAULT_UTILISATION)


def predict_tokens_per_second(model: ModelFacts, machine: MachineFacts, *, dtype: str, compiled: bool) -> float:
    """Trained tokens per second: measured peak times expected utilisation over FLOPs per token."""
    peak = machine.peak.get(dtype) or machine.peak["fp32"]
    return peak * utilisation(machine, compiled=compiled) / model.run_flops


def pipeline_share(pipeline: PipelineLayout, micro_batches: int) -> float:
    """Expected share of a step in which a pipeline's ranks work, with equal stages."""
    return 1.0 - bubble_share(pipeline.schedule, pipeline.stages, micro_batches, pipeline.virtual)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the peak of a training step, by kind."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def predict_memory(
    model: ModelFacts,
    *,
    optimizer: str,
    precision: str,
    micro_rows: int,
    sequence_length: int,
    zero: int = 0,
    shard: int = 1,
    micro_batches: int = 1,
    accumulate: str = "local",
    gather: str = "step",
    recompute: str | int | Mapping[str, int] = "none",
    offload_activations: bool = False,
    optimizer_state: str = "device",
    parameters: str = "device",
    host_is_device: bool = True,
    division: Division | None = None,
) -> MemoryPrediction:
    """Bytes a step needs on the device of one rank, outside the runtime's own (interpreter, libraries, compiler): about
    0.5 GiB on CPU. Parameters include the low-precision or gathered copies that live as long as the forward pass.

    The words are those of `planner.memory.MemorySettings`; `planner.memory.predict_rank_memory` tells the kinds further
    apart, and what goes to the host and to disk.
    """
    settings = MemorySettings(
        micro_rows,
        sequence_length,
        micro_batches=micro_batches,
        precision=precision,
        optimizer=optimizer,
        zero=zero,
        shard=shard,
        accumulate=accumulate,
        gather=gather,
        offload_activations=offload_activations,
        optimizer_state=optimizer_state,
        parameters=parameters,
        host_is_device=host_is_device,
        division=division or Division(),
    ).with_recompute(recompute)
    memory = predict_rank_memory(model, settings)
    return MemoryPrediction(
        parameters=memory.parameters + memory.gathered,
        gradients=memory.gradients + memory.transfers,
        optimizer=memory.optimizer,
        activations=memory.activations,
    )
