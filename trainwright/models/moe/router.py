"""Which experts a token goes to, and with which weights.

Shapes: N tokens, D hidden, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.models.moe.config import MoEConfig

__all__ = ["Router", "Routing", "choose_experts"]


class Routing(NamedTuple):
    """experts [N, k]: chosen, int64. weights [N, k]: of their outputs, fp32. scores [N, E]: adding up to 1, fp32."""

    experts: Tensor
    weights: Tensor
    scores: Tensor


class Router(nn.Module):
    """A linear layer with one output for each expert, and the rule that makes a choice of it.

    Everything is computed in fp32 whatever the precision: a choice that rounding turns over is a jump.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # Named as in transformers. It is moved by `balance`, not by the optimizer, so it is no parameter.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.chooses_by_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        if self.e_score_correction_bias is not None:  # steps of bias_rate vanish in 16 bits
            self.e_score_correction_bias = self.e_score_correction_bias.float()
        return self

    def forward(self, tokens: Tensor) -> Routing:
        kind = "cpu" if tokens.is_meta else tokens.device.type
        with torch.autocast(kind, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
            return choose_experts(logits, self.e_score_correction_bias, self.config)


def choose_experts(logits: Tensor, bias: Tensor | None, config: MoEConfig) -> Routing:
    """The choice that logits [N, E] make; bias [E] has a say in the choice, never in the weights.

    Softmax: the k largest (arXiv 2101.03961, 2401.04088). Sigmoid: of the groups with the largest sum of their two best
    scores, the k largest (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    if config.router_scores == "softmax":
        scores = logits.softmax(-1)
        weights, experts = scores.topk(config.experts_per_token, dim=-1)
        if config.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(experts, weights, scores)
    raw = logits.sigmoid()
    experts = _best_of_groups(raw.detach() if bias is None else raw.detach() + bias, config)
    weights = raw.gather(-1, experts)
    if config.norm_topk:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * config.routed_scale, raw / (raw.sum(-1, keepdim=True) + 1e-20))


def _best_of_groups(scores: Tensor, config: MoEConfig) -> Tensor:
    if config.groups_per_token < config.expert_groups:
        groups = scores.unflatten(-1, (config.expert_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.groups_per_token, dim=-1).indices
        allowed = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
        scores = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    return scores.topk(config.experts_per_token, dim=-1, sorted=False).indices
