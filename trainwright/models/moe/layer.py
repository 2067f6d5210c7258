"""A layer of experts: what stands in a block where a llama has its MLP.

Shapes: B rows, T tokens, N = B * T, D hidden, E experts, k experts of a token, F width of an expert, M copies of
tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.models.llama.model import SwiGLU
from trainwright.models.moe.config import MoEConfig
from trainwright.models.moe.load import LoadRecord
from trainwright.models.moe.router import Router
from trainwright.ops.activation import swiglu
from trainwright.ops.grouped_matmul import grouped_matmul
from trainwright.ops.token_permutation import (
    ExpertOrder,
    count_choices,
    gather_copies,
    sort_by_expert,
    spread_tokens,
)

__all__ = ["Experts", "MoE", "apply_experts", "kept_choices"]


class Experts(nn.Module):
    """The MLPs of all experts of a layer, one parameter for each of the three matrices of all of them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, copies: Tensor, counts: Tensor) -> Tensor:
        """Copies [M, D] in the order of experts, counts [E] of each, through their experts: [M, D]."""
        return apply_experts(copies, counts, self.gate_proj, self.up_proj, self.down_proj)


def apply_experts(copies: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) with the matrices gate, up [E, F, D], down [E, D, F] of each copy's expert."""
    inner = swiglu(grouped_matmul(copies, gate, counts), grouped_matmul(copies, up, counts))
    return grouped_matmul(inner, down, counts)


class MoE(nn.Module):
    """Each token through the experts that the router chooses for it, and through the shared expert where one is.

    `mix` runs copies of the tokens through the experts; who divides experts over processes puts another function with
    its arguments there. `enter` and `leave` are for who divides the sequence between blocks.
    """

    mix: Callable[[Experts, Tensor, ExpertOrder], Tensor]
    enter: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    leave: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.shared_size:
            self.shared_expert = SwiGLU(dataclasses.replace(config, intermediate_size=config.shared_size))
        if config.shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.record = LoadRecord(config.num_experts)

    # The sizes of the groups are data, which a compiler cannot make one graph of.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        out = self.leave(self._routed(self.enter(x)))
        if config.shared_size:
            shared = self.shared_expert(x)
            if config.shared_gate:
                shared = self.shared_expert_gate(x).sigmoid() * shared
            out = out + shared
        return out

    def _routed(self, x: Tensor) -> Tensor:
        """Whole rows x [B, T, D] through the experts that are chosen for their tokens."""
        config = self.config
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        rows = routing.experts.unflatten(0, x.shape[:2])
        kept = None
        if self.training and config.capacity_factor is not None:
            kept = kept_choices(rows.flatten(1), config).view_as(routing.experts)
        if self.training:
            scores = routing.scores.unflatten(0, x.shape[:2]) if config.auxiliary_weight else None
            self.record.add(count_choices(rows.flatten(1), config.num_experts), scores, kept)
        order = sort_by_expert(routing.experts, config.num_experts, kept)
        outputs = gather_copies(self.mix(self.experts, _as_multiplied(tokens), order), order)
        mixed = torch.bmm(routing.weights[:, None].to(outputs.dtype), outputs)
        return mixed.view_as(x)


def _as_multiplied(tokens: Tensor) -> Tensor:
    """Tokens in the type of products under autocast: k copies of each are made, and sent where experts are divided."""
    kind = tokens.device.type
    if not tokens.is_meta and torch.is_autocast_enabled(kind):
        return tokens.to(torch.get_autocast_dtype(kind))
    return tokens


def _mix_here(experts: Experts, tokens: Tensor, order: ExpertOrder) -> Tensor:
    """Copies [M, D] of tokens [N, D] through their experts, all of which are here."""
    out: Tensor = experts(spread_tokens(tokens, order), order.counts)
    return out


MoE.mix = staticmethod(_mix_here)


def kept_choices(experts: Tensor, config: MoEConfig) -> Tensor:
    """Which choices experts [B, C] of a row's C = T * k an expert has room for: True where it has.

    Room is counted in every row by itself, earlier tokens first: what becomes of a token depends neither on other rows
    nor on later tokens.
    """
    assert config.capacity_factor is not None
    rows, choices = experts.shape
    room = math.ceil(config.capacity_factor * choices / config.num_experts)
    counts = count_choices(experts, config.num_experts)
    order = experts.argsort(dim=-1, stable=True)
    places = torch.arange(choices, device=experts.device).expand(rows, -1)
    first = counts.cumsum(-1) - counts
    rank = places - first.gather(-1, experts.gather(-1, order))
    return torch.empty_like(experts, dtype=torch.bool).scatter_(-1, order, rank < room)
