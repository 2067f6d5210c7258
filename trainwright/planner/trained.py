"""From a recipe to what it trains of a model and how the rest is held: read off the modules on the meta device.

The same functions as in a run put adapters beside linears and freeze parts, so that what is counted here is what is
trained there; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trainwright.config import AdapterSection, Recipe
from trainwright.models import ModelConfig, build_model, model_plan
from trainwright.models.adapters import AdapterReport, adapter_options, apply_adapter
from trainwright.models.adapters.linear import NF4_LEAVES
from trainwright.models.adapters.peft_methods import inject_peft_method
from trainwright.models.counting import attention_flops, matmul_sizes
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.counting import sizes_of
from trainwright.models.structure import SplitLinear
from trainwright.optim import OptimizerOptions, Rule
from trainwright.optim.groups import freeze
from trainwright.optim.parts import is_embedding
from trainwright.planner.holdings import BlockSizes, Held, Holding, Training

__all__ = ["Places", "block_sizes", "holdings_of", "places_of", "training_of"]

PER_ROW = ("sequence", "entities")
"""Kinds of heads that see one vector of a row, or two."""


@dataclass(frozen=True)
class Places:
    """Where parameters stand in a model, by names of modules.

    blocks: all repeated blocks, along the model. embedding, head: None where there is none. positions: beside the
    embedding. linears: those inside a block that tensor ranks divide, by their names there.
    """

    blocks: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None
    positions: tuple[str, ...] = ()
    linears: tuple[SplitLinear, ...] = ()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.blocks)}

    def block_of(self, name: str) -> tuple[int, str] | None:
        """(number of the block, name in it) of a parameter; None outside blocks."""
        at = name.find(".")
        while at >= 0:
            if name[:at] in self._numbers:
                return self._numbers[name[:at]], name[at + 1 :]
            at = name.find(".", at + 1)
        return None

    def height(self, name: str) -> int:
        """How far up a parameter stands: -1 before the blocks, then the number of its block, and behind them all their
        number."""
        block = self.block_of(name)
        if block is not None:
            return block[0]
        return -1 if is_embedding(name) or name.rpartition(".")[0] == self.embedding else len(self.blocks)

    def in_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head."""
        return self.head is not None and name.startswith(f"{self.head}.")


def places_of(config: ModelConfig) -> Places:
    """The places of a configuration's model."""
    if isinstance(config, HuggingFaceConfig):
        sizes = sizes_of(config)
        return Places(sizes.blocks, sizes.embedding_name, sizes.head_name)
    plan = model_plan(config)
    before = tuple(name for name in (plan.position_embedding, *plan.embedding_rest) if name is not None)
    blocks = tuple(f"{plan.blocks}.{number}" for number in range(plan.num_blocks))
    return Places(blocks, plan.embedding, plan.head_module, before, plan.linears)


def training_of(
    config: ModelConfig, sequence_length: int, recipe: Recipe, *, positions: float | None = None, labelled: float = 1.0
) -> Training:
    """What `recipe` trains of a model of this configuration, and what a position of its rows costs.

    Args:
        sequence_length: of rows, which attention sees. positions: that a row costs on average; None takes all of it.
        labelled: of these, the share that a loss is taken of: others need no logits.

    Raises:
        ConfigError: patterns or parts that find nothing, or nothing is left to train.
    """
    model: Any = build_model(config, device="meta")
    base = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = places_of(config)
    report = _adapted(model, recipe.adapter, recipe.train.seed)
    rules = tuple(Rule(**dict(rule)) for rule in recipe.optim.rules)
    options = OptimizerOptions(rules=rules, freeze=tuple(recipe.train.freeze))
    freeze(model.named_parameters(remove_duplicate=False), options)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    added = {n: p.numel() for n, p in model.named_parameters() if n in trained and n not in base and p.dim() >= 2}
    sizes = matmul_sizes(config) | added
    lowest = min(places.height(name) for name in trained)
    share = _head_share(model, places, positions or sequence_length, labelled)
    flops = sum(
        size * share(name) * _passes(places.height(name), lowest, len(places.blocks), trained=name in trained)
        for name, size in sizes.items()
    )
    attention = attention_flops(config, sequence_length)
    flops += sum(once * (3.0 if layer >= lowest else 1.0) for layer, once in enumerate(attention))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) if report is None else report.total
    return Training(
        holdings=holdings_of(model, places, _held(report, recipe.adapter)),
        trained=numbers,
        total=total,
        flops=flops,
        first_kept=max(0, lowest),
        kept=0 if report is None else _kept(report),
        what=_what(recipe, report, numbers, total),
    )


def _adapted(model: nn.Module, section: AdapterSection | None, seed: int) -> AdapterReport | None:
    if section is None:
        return None
    if section.name == "peft":
        inject_peft_method(model, section.config, seed=seed)
        return None
    return apply_adapter(model, adapter_options(section, torch.float32), seed=seed)


def _passes(height: int, lowest: int, blocks: int, *, trained: bool) -> float:
    """FLOPs for each number of a matrix: 2 forward, 2 for the gradient of its input, 2 for its own. Gradients of
    activations are computed down to the lowest block with a trained parameter, and not below the head."""
    through = height > lowest or height == lowest < blocks
    return 2.0 + (2.0 if through else 0.0) + (2.0 if trained else 0.0)


def _head_share(model: Any, places: Places, positions: float, labelled: float) -> Callable[[str], float]:
    """(name of a matrix) -> of the positions of a row, the share that it sees."""
    config = model.config
    head = model.task_head
    if head is None:
        return lambda name: labelled if places.in_head(name) else 1.0
    if config.head.kind not in PER_ROW:
        return lambda name: 1.0
    of_head = {id(parameter) for parameter in head.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in of_head}
    return lambda name: 1.0 / positions if name in names or ".pooler." in f".{name}" else 1.0


def holdings_of(
    model: nn.Module, places: Places, held: Callable[[str], Held] = lambda name: "policy"
) -> tuple[Holding, ...]:
    """The parameters of a model by whether they are trained and how they are held, trained ones first.

    Args:
        held: (name of a parameter) -> how it is held.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    kinds: dict[tuple[bool, Held], list[tuple[list[str], int]]] = {}
    for parameter, names in names_of.items():
        kind = held(names[0])
        size = parameter.numel() * (parameter.element_size() if kind == "nf4" else 1)
        kinds.setdefault((parameter.requires_grad, kind), []).append((names, size))
    order = sorted(kinds, key=lambda kind: (not kind[0], kind[1]))
    return tuple(_holding(*kind, kinds[kind], places) for kind in order)


def _holding(trained: bool, held: Held, parameters: list[tuple[list[str], int]], places: Places) -> Holding:
    inside: dict[int, list[tuple[str, int]]] = {}
    outside = dict.fromkeys(("embedding", "head", "positions", "top"), 0)
    tied = False
    for names, size in parameters:
        block = places.block_of(names[0])
        if block is not None:
            inside.setdefault(block[0], []).append((block[1], size))
            continue
        embeds = any(name.rpartition(".")[0] == places.embedding for name in names)
        heads = any(places.in_head(name) for name in names)
        tied = tied or (embeds and heads)
        beside = names[0].rpartition(".")[0] in places.positions or is_embedding(names[0])
        for place in [*["embedding"] * embeds, *["head"] * heads] or ["positions" if beside else "top"]:
            outside[place] += size
    blocks = tuple(block_sizes(inside.get(number, ()), places.linears) for number in range(len(places.blocks)))
    return Holding(trained, held, blocks, **outside, tied=tied)


def block_sizes(sizes: Sequence[tuple[str, int]], linears: Sequence[SplitLinear]) -> BlockSizes:
    """Numbers of a block from those of its parameters, by names inside it. A linear whose output features are divided
    has A of its adapter whole on every tensor rank; one whose input features are, all but its weight and A."""
    by_name = {linear.name: linear for linear in linears}
    found = dict.fromkeys(("total", "whole", "kv", "experts"), 0)
    for name, size in sizes:
        module, _, leaf = name.rpartition(".")
        linear = by_name.get(module)
        found["total"] += size
        if ".experts." in f".{name}":
            found["experts"] += size
        elif linear is None:
            found["whole"] += size if linears else 0  # where nobody knows, all of a block is taken to be divided
        elif not _divides(linear, leaf):
            found["whole"] += size
        elif linear.serves is not None:
            found["kv"] += size
    return BlockSizes(**found)


def _divides(linear: SplitLinear, leaf: str) -> bool:
    return leaf in ("weight", "weight_scale", "lora_A") if linear.kind == "row" else leaf != "lora_A"


def _held(report: AdapterReport | None, section: AdapterSection | None) -> Callable[[str], Held]:
    """How the parameters of a model with adapters are held."""
    if report is None or section is None:
        return lambda name: "policy"
    by_compute = section.base == "auto"

    def held(name: str) -> Held:
        module, _, leaf = name.rpartition(".")
        shape = report.linears.get(module)
        if shape is None or leaf not in NF4_LEAVES:
            return "policy"
        if shape.base != "as_is":
            return shape.base
        return "compute" if by_compute and report.options.base != "nf4" else "policy"

    return held


def _kept(report: AdapterReport) -> int:
    """What low-rank additions keep of a position: A x; of DoRA the sum that is scaled; with dropout what A is given."""
    options = report.options
    return sum(
        options.rank
        + (shape.out_features if options.name == "dora" else 0)
        + (shape.in_features if options.dropout else 0)
        for shape in report.linears.values()
    )


def _what(recipe: Recipe, report: AdapterReport | None, trained: int, total: int) -> str:
    if trained == total:
        return "all parameters"
    section = recipe.adapter
    by = "adapter" if section is not None else "train.freeze" if recipe.train.freeze else "optim.rules"
    line = (
        f"{trained:,} of {total:,} parameters ({trained / max(1, total):.2%}, by {by}): only these have gradients and"
        " optimizer state"
    )
    if report is not None and report.options.base == "nf4" and report.base_bytes:
        line += f"; frozen weights in 4 bits take {report.base_bytes / report.base_bytes_bf16:.2f} of bf16"
    return line
