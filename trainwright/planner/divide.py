"""A batch over ranks: rows of a step and of a pass, the layout under which they train, and the memory that takes.

These hang together: how many ranks work on the same rows decides how many rows each gets, and what fits decides how
many ranks work on the same rows. Open degrees are tried in order, and the first with which a step fits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.base.device import free_disk_bytes
from trainwright.base.errors import ConfigError
from trainwright.comm.layout import Layout
from trainwright.config import Recipe
from trainwright.config.pipeline_section import parts_per_rank
from trainwright.config.precision_section import BF16PurePrecision
from trainwright.planner import rules
from trainwright.planner.division import Division
from trainwright.planner.facts import BatchFacts, DataFacts, MachineFacts, ModelFacts
from trainwright.planner.layout import Degrees, LayoutChoice, choose_layout, degree_candidates, other_degrees
from trainwright.planner.ledger import AUTO, Budget, Ledger
from trainwright.planner.memory import MemorySettings, RankMemory, predict_rank_memory
from trainwright.planner.memory_fit import Alternative, MemoryLimits, alternatives, shortfalls
from trainwright.planner.plan import Decision

__all__ = ["Divided", "Question", "divide"]

MLP_PIECES = (1, 2, 4, 8)  # an eighth of what MLPs make is little beside their inputs


@dataclass(frozen=True)
class Question:
    """What is to be divided."""

    recipe: Recipe
    machine: MachineFacts
    data: DataFacts
    model: ModelFacts
    precision: str
    budget: Budget


@dataclass
class Divided:
    """The answer: what was decided, and what a step needs under it."""

    question: Question
    layout: Layout
    batch: BatchFacts
    steps: int
    settings: MemorySettings
    limits: MemoryLimits
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def memory(self) -> RankMemory:
        """Bytes of the rank that needs most."""
        return predict_rank_memory(self.question.model, self.settings)

    @property
    def fits(self) -> bool:
        return not shortfalls(self.memory, self.limits)

    def others(self) -> Iterator[Alternative]:
        """Configurations that need less, other degrees of the layout among them."""
        ask = self.question
        yield from alternatives(
            ask.model,
            self.settings,
            world=ask.machine.ranks,
            nvme=ask.recipe.memory.nvme_path is not None,
            divisions=[Division.of(layout) for layout in other_degrees(self.layout, ask.model, self.batch)],
        )


def divide(ask: Question) -> Divided:
    """Settle batch, micro-batch and layout.

    Degrees under which model or batch do not divide are passed over where others are open; where nothing fits, the
    answer is the first that is legal.

    Raises:
        ConfigError: no candidate is legal; tells why the first is not.
    """
    machine = ask.machine
    candidates = degree_candidates(
        ask.recipe.parallel, machine.ranks, model=ask.model, ranks_on_host=machine.ranks_on_host
    )
    first: Divided | None = None
    refused: ConfigError | None = None
    for degrees in candidates:
        try:
            divided = _divide_by(degrees, ask)
        except ConfigError as error:
            refused = refused or error
            continue
        if divided.fits:
            return divided
        first = first or divided
    if first is None:
        assert refused is not None
        raise refused
    return first


def _divide_by(degrees: Degrees, ask: Question) -> Divided:
    ledger = Ledger()
    recipe, machine, data = ask.recipe, ask.machine, ask.data
    row_ranks = max(1, machine.ranks // degrees.same_rows)
    batch_tokens = ledger.settle(
        "train.batch_tokens",
        recipe.train.batch_tokens if recipe.train.batch_tokens == AUTO else int(recipe.train.batch_tokens),
        lambda: rules.choose_batch_tokens(ask.model, data, ask.budget.tokens, ranks=row_ranks, stages=degrees.stages),
    )
    rows = _rows(batch_tokens, data, row_ranks, machine.ranks)
    steps = _settle_steps(ledger, recipe, ask.budget, rows * data.trained_per_row, data.counted)
    section = recipe.parallel.pipeline
    run = None if section.micro_batches == AUTO or degrees.stages == 1 else int(section.micro_batches)
    micro_rows = _settle_micro_rows(ledger, ask, degrees, rows, row_ranks, run)
    passes = rows // row_ranks // micro_rows
    batch = BatchFacts(rows, micro_rows, data.sequence_length, run)
    settings = _memory_settings(ask, batch, passes)
    limits = _limits(machine, recipe.memory.nvme_path)
    chosen, settings = _choose(ask, degrees, batch, settings, limits)
    if machine.ranks > 1:
        ledger.decisions.extend(chosen.decisions)
    if recipe.memory.mlp_chunks == AUTO:
        pieces = settings.mlp_chunks
        reason = "whole sequences fit" if pieces == 1 else "the fewest pieces with which activations fit"
        if pieces == 1 and shortfalls(predict_rank_memory(ask.model, settings), limits):
            reason = "pieces alone would not make it fit"
        ledger.decisions.append(Decision("memory.mlp_chunks", pieces, reason))
    return Divided(ask, chosen.layout, batch, steps, settings, limits, ledger)


def _choose(
    ask: Question, degrees: Degrees, batch: BatchFacts, settings: MemorySettings, limits: MemoryLimits
) -> tuple[LayoutChoice, MemorySettings]:
    """The layout, and the memory settings under it, MLPs in as few pieces as it takes to fit."""
    shape = ask.model.shape
    given = ask.recipe.memory.mlp_chunks
    pieces = MLP_PIECES if given == AUTO and not (shape is not None and shape.experts) else MLP_PIECES[:1]
    found = []
    for chunks in pieces if given == AUTO else (int(given),):
        tried = replace(settings, mlp_chunks=chunks)

        def fits(layout: Layout, tried: MemorySettings = tried) -> bool:
            return not shortfalls(predict_rank_memory(ask.model, tried.under(layout)), limits)

        chosen = choose_layout(
            ask.recipe.parallel,
            ask.machine.ranks,
            accumulation=settings.micro_batches,
            degrees=degrees,
            model=ask.model,
            batch=batch,
            fits=fits,
        )
        found.append((chosen, tried.under(chosen.layout)))
        if fits(chosen.layout):
            return found[-1]
    return found[0]


def _rows(batch_tokens: int, data: DataFacts, ranks: int, world: int) -> int:
    rows, rest = divmod(batch_tokens, data.sequence_length)
    if rest or rows < 1:
        below, above = rows * data.sequence_length, (rows + 1) * data.sequence_length
        raise ConfigError(
            f"train.batch_tokens {batch_tokens} is not a whole number of rows of data.sequence_length"
            f" {data.sequence_length}",
            hint=f"use {above}" if rows < 1 else f"use {below} or {above}",
        )
    if rows % ranks:
        lower = rows // ranks * ranks
        sizes = [size * data.sequence_length for size in (lower, lower + ranks) if size]
        hint = f"use train.batch_tokens={' or '.join(map(str, sizes))}"
        if ranks == world:
            hint += f", or {_nearest_divisor(rows, ranks)} processes"
        raise ConfigError(
            f"train.batch_tokens {batch_tokens} is {rows} rows, which {_ranks(ranks, world)} cannot share equally",
            hint=hint,
        )
    return rows


def _settle_steps(ledger: Ledger, recipe: Recipe, budget: Budget, trained_per_step: float, counted: str) -> int:
    if budget.steps is not None:
        return budget.steps
    steps, reason = rules.choose_steps(trained_per_step, tokens=budget.tokens, what=budget.what, counted=counted)
    for key in ("tokens", "epochs", "time"):
        if getattr(recipe.train, key) is not None:
            ledger.decisions.append(Decision(f"train.{key}", None, "became train.steps"))
    ledger.decisions.append(Decision("train.steps", steps, reason))
    return int(steps)


def _settle_micro_rows(
    ledger: Ledger, ask: Question, degrees: Degrees, rows: int, row_ranks: int, run: int | None
) -> int:
    each = rows // row_ranks
    micro_rows: int = ledger.settle(
        "train.micro_batch",
        ask.recipe.train.micro_batch,
        lambda: rules.choose_micro_batch(
            ask.model,
            ask.data,
            ask.machine,
            batch_rows=each,
            optimizer=ask.recipe.optim.name,
            precision=ask.precision,
            division=_division(ask.recipe.parallel.pipeline, degrees),
            run=run,
        ),
    )
    if each % micro_rows:
        share = f", {each} for each of {_ranks(row_ranks, ask.machine.ranks)}" if row_ranks > 1 else ""
        length = ask.data.sequence_length
        raise ConfigError(
            f"train.micro_batch {micro_rows} does not divide the batch of {rows} rows{share}"
            f" (train.batch_tokens {rows * length} / data.sequence_length {length})",
            hint=f"the nearest that does is {_nearest_divisor(each, micro_rows)}",
        )
    return micro_rows


def _division(section: Any, degrees: Degrees) -> Division:
    if degrees.stages == 1:
        return Division(degrees.tensor, degrees.context, degrees.expert)
    return Division(
        degrees.tensor,
        degrees.context,
        degrees.expert,
        degrees.stages,
        section.schedule,
        parts_per_rank(section.schedule, section.virtual),
        # Cuts that do not fit the model are the layout's to refuse.
        None,
    )


def _ranks(rows: int, world: int) -> str:
    return f"{rows} processes" if rows == world else f"{rows} ranks with rows of their own ({world} processes)"


def _nearest_divisor(rows: int, wanted: int) -> int:
    return min((d for d in range(1, rows + 1) if rows % d == 0), key=lambda d: (abs(d - wanted), d))


def _memory_settings(ask: Question, batch: BatchFacts, micro_batches: int) -> MemorySettings:
    recipe = ask.recipe
    section = recipe.memory
    settings = MemorySettings(
        batch.micro_rows,
        batch.sequence_length,
        micro_batches=micro_batches,
        run=batch.run,
        precision=ask.precision,
        optimizer=recipe.optim.name,
        update=recipe.precision.update if isinstance(recipe.precision, BF16PurePrecision) else "master",
        offload_activations=section.offload_activations,
        optimizer_state=section.optimizer_state,
        parameters=section.parameters,
        host_is_device=ask.machine.kind != "cuda",
    )
    return settings.with_recompute(section.recompute if isinstance(section.recompute, str) else section.recompute.every)


def _limits(machine: MachineFacts, nvme_path: str | None) -> MemoryLimits:
    disk = None if nvme_path is None else free_disk_bytes(nvme_path) // machine.ranks
    if machine.kind != "cuda":
        return MemoryLimits(machine.name, machine.memory_bytes, disk=disk)
    return MemoryLimits(machine.name, machine.host_bytes or machine.memory_bytes, machine.memory_bytes, disk)
