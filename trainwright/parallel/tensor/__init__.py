"""Tensor parallelism: every block's matrices, the vocabulary and the residual stream divided over processes."""

from __future__ import annotations

from trainwright.parallel.tensor.apply import apply_tensor
from trainwright.parallel.tensor.legality import legal_degrees, tensor_problems
from trainwright.parallel.tensor.overlap import overlap_problems, overlap_products

__all__ = [
    "apply_tensor",
    "legal_degrees",
    "overlap_problems",
    "overlap_products",
    "tensor_problems",
]
