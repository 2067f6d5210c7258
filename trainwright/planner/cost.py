"""Cost model: bytes and seconds of a run, as pure functions of plain numbers.

Constants that were measured carry the machine they were measured on. The prediction stands beside the measurement in
every run's `run.json`, so an error here is seen, not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.planner.facts import MachineFacts, ModelFacts

__all__ = ["MemoryPrediction", "predict_memory", "predict_tokens_per_second", "utilisation"]

# Share of the measured matmul peak that a whole training step reaches, by (device kind, compiled).
# CPU, compiled: measured on 2 cores of an AMD EPYC 9004: 0.63 for a llama of 5M parameters, 0.73 for 34M
# (docs/benchmarks.md). CPU, eager, and CUDA (published dense single-GPU runs: 0.35-0.5): estimates.
_UTILISATION = {("cpu", True): 0.65, ("cpu", False): 0.35, ("cuda", True): 0.45, ("cuda", False): 0.35}
_DEFAULT_UTILISATION = 0.25

# Kept for the backward pass, bytes per token, layer and unit of width, for a llama block with fused attention in bf16:
# 28 tensors of 2 bytes (measured on Llama-3.1-8B shapes; ml-engineering counts the same). fp32 doubles it.
_ACTIVATION_BYTES = 56

# Moments in bytes per parameter, in fp32: AdamW two moments, Lion, SGD with momentum and Muon one;
# Adafactor factors its second moment to almost nothing.
_OPTIMIZER_BYTES = {"adamw": 8.0, "lion": 4.0, "sgd": 4.0, "muon": 5.0, "adafactor": 0.1}


def utilisation(machine: MachineFacts, *, compiled: bool) -> float:
    """Expected share of the measured matmul peak, 0 to 1."""
    return _UTILISATION.get((machine.kind, compiled), _DEFAULT_UTILISATION)


def predict_tokens_per_second(model: ModelFacts, machine: MachineFacts, *, dtype: str, compiled: bool) -> float:
    """Trained tokens per second: measured peak times expected utilisation over FLOPs per token."""
    peak = machine.peak.get(dtype) or machine.peak["fp32"]
    return peak * utilisation(machine, compiled=compiled) / model.flops_per_token


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
    model: ModelFacts, *, optimizer: str, precision: str, micro_rows: int, sequence_length: int
) -> MemoryPrediction:
    """Bytes a step needs, outside the runtime's own (interpreter, libraries, compiler): about 0.5 GiB on CPU."""
    width = 2 if precision == "bf16_pure" else 4
    activation_scale = 2 if precision == "fp32" else 1
    tokens = micro_rows * sequence_length
    per_token = _ACTIVATION_BYTES * model.layers * model.width * activation_scale
    # Moments are fp32; beside bf16 weights the optimizer also keeps an fp32 copy of them.
    state = _OPTIMIZER_BYTES.get(optimizer, 8.0) + (4.0 if precision == "bf16_pure" else 0.0)
    # The bf16 copy of the weights that autocast makes lives as long as the forward pass.
    parameters = model.parameters * (6 if precision == "bf16" else width)
    return MemoryPrediction(
        parameters=parameters,
        gradients=model.parameters * width,
        optimizer=round(model.parameters * state),
        activations=tokens * per_token,
    )
