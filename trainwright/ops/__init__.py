"""Kernels, each with a plain-torch twin that tests compare it to: attention, chunked linear cross entropy, norms,
rotary.
"""

from __future__ import annotations

from trainwright.ops.activation import activation, swiglu
from trainwright.ops.attention import attention, attention_backend_reason, attention_reference, choose_backend
from trainwright.ops.linear import fused_linear
from trainwright.ops.linear_cross_entropy import LossSums, linear_cross_entropy, linear_cross_entropy_reference
from trainwright.ops.norm import layer_norm, rms_norm
from trainwright.ops.rotary import RotaryScaling, apply_rotary, rotary_tables

__all__ = [
    "LossSums",
    "RotaryScaling",
    "activation",
    "apply_rotary",
    "attention",
    "attention_backend_reason",
    "attention_reference",
    "choose_backend",
    "fused_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "rms_norm",
    "rotary_tables",
    "swiglu",
]
