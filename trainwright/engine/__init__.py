"""The engine composes model, optimizer, precision, parallelism and clipping into forward, backward and step."""

from trainwright.engine.compile import compile_blocks
from trainwright.engine.consolidate import readable_weights
from trainwright.engine.engine import Engine, StepReport
from trainwright.engine.options import learning_rate_multiplier, optimizer_options, scaler_options
from trainwright.engine.precision import PRECISIONS, Precision, keep_residual_fp32, precision, wire_type

__all__ = [
    "PRECISIONS",
    "Engine",
    "Precision",
    "StepReport",
    "compile_blocks",
    "keep_residual_fp32",
    "learning_rate_multiplier",
    "optimizer_options",
    "precision",
    "readable_weights",
    "scaler_options",
    "wire_type",
]
