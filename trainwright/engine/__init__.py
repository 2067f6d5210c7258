"""The engine composes model, optimizer, precision and clipping into forward, backward and step."""

from trainwright.engine.compile import compile_blocks
from trainwright.engine.engine import Engine, StepReport
from trainwright.engine.precision import PRECISIONS, Precision, precision

__all__ = ["PRECISIONS", "Engine", "Precision", "StepReport", "compile_blocks", "precision"]
