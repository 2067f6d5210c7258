"""The frozen weights beside adapters: opened where they are held in 4 bits, and known again by a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainwright.models.adapters.apply import AdapterReport
from trainwright.models.adapters.linear import NF4_LEAVES
from trainwright.models.adapters.names import FileNames
from trainwright.models.adapters.nf4 import NF4, dequantise
from trainwright.models.exporting import WeightSource

__all__ = ["is_other_weight", "opened_rows", "sample_of_base"]

NUMBERS = 64
"""Of the first row of a weight: what is kept to know it again."""

NEAR = 0.5
"""Relative distance of two samples of one weight at most: 4 bits are 0.1 away, and other weights 1.4."""


def opened_rows(report: AdapterReport, source: WeightSource, module: str, first: int, rows: int) -> Tensor:
    """Rows of the frozen weight of a linear, in fp32."""

    def part(leaf: str) -> Tensor:
        return source.read(f"{module}.{leaf}", first, rows)

    if report.linears[module].nf4:
        return dequantise(NF4(*(part(leaf) for leaf in NF4_LEAVES)), torch.float32)
    return part("weight").float()


def sample_of_base(report: AdapterReport, names: FileNames, source: WeightSource) -> dict[str, list[float]]:
    """Numbers of the first and the last frozen weight, by the names that files have for the linears."""
    found = {}
    linears = list(report.linears)
    for module in dict.fromkeys((*linears[:1], *linears[-1:])):
        shape = (report.linears[module].out_features, report.linears[module].in_features)
        row = opened_rows(report, source, module, 0, 1)[0]
        found[names.module(module, shape)] = [float(f"{value:.4g}") for value in row[:NUMBERS].tolist()]
    return found


def is_other_weight(sample: Sequence[float], weight: Tensor) -> bool:
    """Whether a weight [O, I] is not the one that a sample is of. Rounded and quantised ones are the same; of rows of
    another length nothing is said."""
    known = torch.tensor(list(sample))
    seen = weight[0, : len(known)].detach().float().cpu()
    return known.shape == seen.shape and bool((known - seen).norm() > NEAR * known.norm() + 1e-6)
