"""The mixture-of-experts family: a llama whose blocks hold layers of experts, and what keeps their loads alike.

Parameter names are those of transformers before it joins experts: `mlp.gate.weight`, `mlp.experts.gate_proj`, ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainwright.models.cache import KVCache
from trainwright.models.llama.model import LlamaForCausalLM
from trainwright.models.moe.config import MoEConfig
from trainwright.models.moe.layer import MoE
from trainwright.models.moe.load import auxiliary_sums, describe_loads

__all__ = ["MoEForCausalLM"]


class MoEForCausalLM(LlamaForCausalLM):
    """A decoder-only language model with experts.

    `sum_over_row` adds up a tensor over everyone who holds a piece of the same rows; who cuts sequences puts another
    function there. `copies_of_row`: how many processes compute the same rows whole and add up their gradients.
    """

    config: MoEConfig
    sum_over_row: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)
    copies_of_row: int = 1

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        for layer in config.moe_layers():
            self.model.layers[layer].mlp = MoE(config, layer)
        self._loads: dict[int, Tensor] = {}

    def moe_layers(self) -> list[MoE]:
        """The layers of experts that this module holds, in order."""
        return [module for module in self.blocks.modules() if isinstance(module, MoE)]

    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        for moe in self.moe_layers():
            moe.record.take_parts()  # of a forward pass whose auxiliary loss nobody asked for
        return super().run_blocks(x, position_ids, document_ids, key_mask, cache)

    def auxiliary_loss(self, labels: Tensor) -> Tensor | None:
        """The load-balancing loss of the latest forward pass in training, as a sum over the trained tokens of labels
        [B, T] (or texts, [B]), of the layers that are here.

        For every row and layer E * sum_e f_e P_e, with f_e the choices of expert e per token and P_e the mean of its
        scores (Switch Transformer, arXiv 2101.03961, equations 4 to 6, as transformers counts it), the mean over the
        model's layers, weighted by the row's trained tokens. Where a row is cut, the pieces' losses add up to it.
        """
        layers = [parts for moe in self.moe_layers() if (parts := moe.record.take_parts())]
        if not layers:
            return None
        choices, scores, length = auxiliary_sums(layers)
        trained = (labels.reshape(labels.shape[0], -1) != -100).sum(-1)
        # One message: the choices of all layers, the trained tokens and the length of each row.
        facts = torch.stack((trained, torch.full_like(trained, length)), dim=1)
        whole = self.sum_over_row(torch.cat((choices.transpose(0, 1).flatten(1), facts), dim=1))
        count, tokens = whole[:, -2:].to(scores.dtype).unbind(1)
        choices = whole[:, :-2].unflatten(1, (len(layers), -1)).transpose(0, 1)
        each = (choices * scores).sum(-1) * (self.config.num_experts / tokens.square())
        loss = (each * count).sum() * (self.config.auxiliary_weight / len(self.config.moe_layers()))
        if self.copies_of_row > 1:  # each of them has the whole loss, and a part of its gradient
            return loss / self.copies_of_row + (loss - loss / self.copies_of_row).detach()
        return loss

    def take_loads(self) -> Tensor | None:
        """Choices of each expert since the last call, and those dropped: [layers here, E + 1], integers on the device.

        Of this process's tokens; add them up over all processes that have other ones.
        """
        device = self.device_of_blocks
        return torch.stack([moe.record.take_totals(device) for moe in self.moe_layers()]) if self.moe_layers() else None

    @torch.no_grad()
    def update_balance(self, loads: Tensor) -> None:
        """End a step whose loads over all processes are [layers here, E + 1].

        Each expert's bias moves by `bias_rate` up where it got less than the mean, down where more (arXiv 2408.15664,
        algorithm 1). The loads are kept for `load_statistics`.
        """
        for moe, load in zip(self.moe_layers(), loads, strict=True):
            self._loads[moe.layer] = load
            bias = moe.gate.e_score_correction_bias
            if bias is not None and self.config.bias_rate:
                choices = load[:-1].float()
                bias += self.config.bias_rate * torch.sign(choices.mean() - choices)

    def load_statistics(self) -> dict[str, float]:
        """The latest step's loads as plain numbers for a log, given up when read; waits for the device."""
        loads, self._loads = self._loads, {}
        return describe_loads({layer: load.tolist() for layer, load in loads.items()})

    @property
    def device_of_blocks(self) -> torch.device:
        """Where the blocks are."""
        return next(self.blocks.parameters()).device
