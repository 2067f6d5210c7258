"""How many tokens each expert of a layer gets: recorded without waiting for the device.

Private name: `torch._C._current_graph_task_id`, as in torch.utils.checkpoint, says whether a backward pass runs. A
layer that is computed again in the backward pass must not count its tokens twice, and nothing public tells it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["LoadRecord", "auxiliary_sums", "describe_loads", "is_recomputing", "join_load_statistics"]


def is_recomputing() -> bool:
    """Whether this forward pass is part of a backward pass, as with activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


class LoadRecord:
    """What one layer has seen.

    Attributes:
        parts: of the latest forward pass, (choices [B, E], scores [B, T, E] with their graph), for the auxiliary loss.
        totals: [E + 1] since they were taken: choices of each expert, and how many were dropped.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.totals: Tensor | None = None

    def add(self, choices: Tensor, scores: Tensor | None, kept: Tensor | None) -> None:
        """Note a forward pass of training: choices [B, E], scores [B, T, E], kept [N, k] where some were dropped."""
        if not torch.is_grad_enabled() or is_recomputing():
            return
        if scores is not None:
            self.parts.append((choices, scores))
        dropped = choices.new_zeros(1) if kept is None else (~kept).sum().reshape(1)
        seen = torch.cat((choices.sum(0), dropped))
        self.totals = seen if self.totals is None else self.totals + seen

    def take_parts(self) -> list[tuple[Tensor, Tensor]]:
        """The parts of the latest forward pass, which are given up."""
        parts, self.parts = self.parts, []
        return parts

    def take_totals(self, device: torch.device) -> Tensor:
        """The totals, which start again from zero."""
        totals, self.totals = self.totals, None
        return torch.zeros(self.num_experts + 1, dtype=torch.int64, device=device) if totals is None else totals


def auxiliary_sums(layers: Sequence[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor, int]:
    """What the auxiliary loss needs of each layer's parts: choices [L, B, E], sums of scores [L, B, E], T tokens."""
    choices = torch.stack([torch.stack([part[0] for part in parts]).sum(0) for parts in layers])
    scores = torch.stack([torch.stack([part[1].sum(1) for part in parts]).sum(0) for parts in layers])
    return choices, scores, sum(part[1].shape[1] for part in layers[0])


def describe_loads(loads: Mapping[int, Sequence[int]]) -> dict[str, float]:
    """Numbers for a log from each layer's totals (see `LoadRecord`).

    `moe/imbalance`: the fullest expert's tokens over the mean expert's, 1 for equal loads, the mean of all layers;
    `moe/imbalance_max`: of the worst layer; `moe/idle_experts`: share of experts without a token; `moe/dropped`: share
    of choices that found no room; `moe/layer_<n>/imbalance` and `moe/layer_<n>/load_max`, the fullest expert's share.
    """
    described: dict[str, float] = {}
    imbalances, idle, dropped, chosen = [], 0, 0, 0
    for layer, totals in loads.items():
        experts, lost = totals[:-1], totals[-1]
        whole = sum(experts)
        if not whole:
            continue
        imbalance = max(experts) * len(experts) / whole
        described[f"moe/layer_{layer}/imbalance"] = imbalance
        described[f"moe/layer_{layer}/load_max"] = max(experts) / whole
        imbalances.append(imbalance)
        idle += sum(count == 0 for count in experts)
        dropped += lost
        chosen += whole
    if not imbalances:
        return {}
    experts_in_all = sum(len(totals) - 1 for totals in loads.values())
    return {
        "moe/imbalance": sum(imbalances) / len(imbalances),
        "moe/imbalance_max": max(imbalances),
        "moe/idle_experts": idle / experts_in_all,
        "moe/dropped": dropped / chosen,
        **described,
    }


def join_load_statistics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One description from those of processes that hold different layers (several may hold the same ones)."""
    different = {tuple(sorted(part.items())): part for part in parts if part}.values()
    joined: dict[str, float] = {}
    layers = [sum(key.endswith("/load_max") for key in part) for part in different]
    for part in different:
        joined |= {key: value for key, value in part.items() if key.startswith("moe/layer_")}
    if not joined:
        return {}
    for key in ("moe/imbalance", "moe/idle_experts", "moe/dropped"):
        joined[key] = sum(n * part[key] for n, part in zip(layers, different, strict=True)) / sum(layers)
    joined["moe/imbalance_max"] = max(part["moe/imbalance_max"] for part in different)
    return joined
