"""What both sides train: the same llama, the same rows for every rank and step, the same loss."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from trainwright.models import Decoder, ModelConfig, build_model, preset, replace
from trainwright.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["ADAMW", "CLIP", "LossModel", "Workload", "workload_from_arguments"]

# No weight decay: which parameters have it differs between the two (all, or matrices only).
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0
SHAPES = {
    "34m": lambda: preset("llama-34m", vocab_size=8192),
    "6m": lambda: replace(preset("llama-5m"), tie_embeddings=False),
}


@dataclass(frozen=True)
class Workload:
    """One run's sizes.

    Attributes:
        shape: name of a model in `SHAPES`.
        stage: ZeRO stage.
        accumulation: micro-batches of one optimizer step.
        micro: rows of one micro-batch on one rank.
        sequence: tokens of a row.
    """

    shape: str = "34m"
    stage: int = 1
    accumulation: int = 1
    micro: int = 4
    sequence: int = 512

    def config(self) -> ModelConfig:
        return SHAPES[self.shape]()

    def parameters(self) -> int:
        return sum(p.numel() for p in build_model(self.config(), device="meta").parameters())

    def model(self) -> Decoder:
        """fp32, the same initial weights everywhere."""
        return build_model(self.config(), seed=0)

    def tokens_per_step(self, ranks: int) -> int:
        return ranks * self.accumulation * self.micro * self.sequence

    def micro_batches(self, step: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the step's rows; all ranks together see the same rows however many they are."""
        generator = torch.Generator().manual_seed(step)
        rows = ranks * self.accumulation * self.micro
        words = self.config().vocab_size
        uniform = torch.rand(rows, self.sequence + 1, generator=generator)
        tokens = (words**uniform - 1).long().clamp(max=words - 1)  # Zipf-like, as real text is
        for number in range(self.accumulation):
            first = (number * ranks + rank) * self.micro
            mine = tokens[first : first + self.micro]
            yield {"input_ids": mine[:, :-1].contiguous(), "labels": mine[:, 1:].contiguous()}

    def arguments(self) -> list[str]:
        """The command line from which `workload_from_arguments` makes an equal one."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def workload_from_arguments(parser: argparse.ArgumentParser) -> tuple[Workload, argparse.Namespace]:
    """Add the options of a Workload to `parser` and read the command line."""
    for field in fields(Workload):
        default = field.default
        parser.add_argument(f"--{field.name}", type=type(default), default=default)
    options = parser.parse_args()
    return Workload(**{field.name: getattr(options, field.name) for field in fields(Workload)}), options


class LossModel(nn.Module):
    """A decoder whose forward is its mean next-token loss: what a loop over any engine needs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.decoder.hidden_states(input_ids)
        sums = linear_cross_entropy(hidden.flatten(0, 1), self.decoder.head_weight, labels.flatten(), compiled=True)
        return sums.loss_sum / sums.count

    def compile_blocks(self, what: str) -> None:
        """Each block a graph of its own. what: "call" compiles its hooks too, "forward" leaves them outside."""
        for module in (*self.decoder.blocks, self.decoder.final_norm):
            if what == "call":
                module.compile(dynamic=False)
            else:
                module.forward = torch.compile(module.forward, dynamic=False)  # type: ignore[method-assign]
