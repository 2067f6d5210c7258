"""Resolve a recipe: apply the rules in their order to every "auto", and predict what the result will cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainwright.base.device import free_disk_bytes
from trainwright.base.errors import ConfigError
from trainwright.base.units import Duration
from trainwright.comm.mesh import Layout
from trainwright.config import Recipe
from trainwright.config.optim_section import Muon
from trainwright.config.precision_section import BF16PurePrecision
from trainwright.planner import rules
from trainwright.planner.cost import predict_tokens_per_second
from trainwright.planner.facts import DataFacts, MachineFacts, ModelFacts
from trainwright.planner.layout import choose_layout
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.planner.memory_fit import MemoryLimits, alternatives, refuse_before_allocating, shortfalls
from trainwright.planner.plan import Decision, Plan, Prediction

__all__ = ["resolve"]

AUTO = "auto"


def resolve(recipe: Recipe, machine: MachineFacts, data: DataFacts, model: ModelFacts) -> Plan:
    """Turn every "auto" of `recipe` into a value with a reason.

    Raises:
        ConfigError: sizes that do not divide, or a budget that trains nothing.
        MemoryLimitError: the weights, gradients and optimizer state alone do not fit.
    """
    ledger = _Ledger()
    train = recipe.train
    precision = ledger.settle("precision", recipe.precision.name, lambda: rules.choose_precision(machine))
    dtype = "fp32" if precision == "fp32" else "bf16"
    ledger.settle("train.threads", train.threads, lambda: (machine.cores, "all usable cores"))
    ledger.settle("train.deterministic", train.deterministic, lambda: rules.choose_deterministic(machine))

    eager = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=False)
    budget = _token_budget(recipe, model, machine, data, dtype, eager)
    batch_tokens = ledger.settle(
        "train.batch_tokens",
        _number(train.batch_tokens),
        lambda: rules.choose_batch_tokens(model, data, budget.tokens, ranks=machine.ranks),
    )
    batch_rows = _rows(batch_tokens, data, machine.ranks)
    trained = batch_rows * data.trained_per_row
    rank_rows = batch_rows // machine.ranks
    steps = _settle_steps(ledger, recipe, budget, trained)
    tokens = round(steps * trained)

    micro_rows = ledger.settle(
        "train.micro_batch",
        train.micro_batch,
        lambda: rules.choose_micro_batch(
            model, data, machine, batch_rows=rank_rows, optimizer=recipe.optim.name, precision=precision
        ),
    )
    if rank_rows % micro_rows:
        share = f", {rank_rows} for each of {machine.ranks} processes" if machine.ranks > 1 else ""
        raise ConfigError(
            f"train.micro_batch {micro_rows} does not divide the batch of {batch_rows} rows{share}"
            f" (train.batch_tokens {batch_tokens} / data.sequence_length {data.sequence_length})",
            hint=f"the nearest that does is {_nearest_divisor(rank_rows, micro_rows)}",
        )
    settings = _memory_settings(recipe, machine, data, precision, micro_rows, rank_rows // micro_rows)
    limits = _limits(machine, recipe.memory.nvme_path)
    chosen = choose_layout(
        recipe.parallel,
        machine.ranks,
        accumulation=rank_rows // micro_rows,
        fits=lambda layout: not shortfalls(predict_rank_memory(model, _under(settings, layout)), limits),
    )
    if machine.ranks > 1:
        ledger.decisions.extend(chosen.decisions)
    compiled = ledger.settle(
        "train.compile", train.compile, lambda: rules.choose_compile(machine, eager_seconds=tokens / eager)
    )
    ledger.settle(
        "optim.lr",
        recipe.optim.lr,
        lambda: rules.choose_learning_rate(model, tokens, optimizer=_update_kind(recipe)),
    )
    _settle_schedule(ledger, recipe, steps)
    _settle_evaluation(ledger, recipe, data, steps, tokens)

    settings = _under(settings, chosen.layout)
    memory = predict_rank_memory(model, settings)
    nvme = recipe.memory.nvme_path is not None
    refuse_before_allocating(memory, limits, alternatives(model, settings, world=machine.ranks, nvme=nvme))
    rate = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=bool(compiled))
    return Plan(
        decisions=tuple(ledger.decisions),
        steps=steps,
        batch_rows=batch_rows,
        micro_rows=micro_rows,
        tokens=tokens,
        parameters=model.parameters,
        flops_per_token=model.flops_per_token,
        peak_flops=machine.peak.get(dtype) or machine.peak["fp32"],
        machine=asdict(machine),
        data=asdict(data),
        prediction=Prediction(
            tokens_per_second=rate,
            step_seconds=trained / rate,
            total_seconds=tokens / rate,
            memory={**memory.kinds(), "total": memory.device},
        ),
        layout=chosen.layout,
    )


@dataclass
class _Ledger:
    """Collects decisions: a value that the recipe gives stands, an "auto" is decided and written down."""

    decisions: list[Decision] = field(default_factory=list)

    def settle(self, key: str, given: Any, decide: Any) -> Any:
        if given != AUTO:
            return given
        value, reason = decide()
        self.decisions.append(Decision(key, value, reason))
        return value


@dataclass(frozen=True)
class _Budget:
    """How long to train: trained tokens, and how that came about."""

    tokens: int
    what: str
    steps: int | None = None


def _update_kind(recipe: Recipe) -> str:
    """The optimizer as the learning-rate rule tells them apart: Muon has two scalings of its update."""
    optim = recipe.optim
    return "muon_original" if isinstance(optim, Muon) and optim.lr_adjust == "original" else optim.name


def _number(value: Any) -> Any:
    return value if value == AUTO else int(value)


def _token_budget(
    recipe: Recipe, model: ModelFacts, machine: MachineFacts, data: DataFacts, dtype: str, eager: float
) -> _Budget:
    train = recipe.train
    if train.steps is not None:
        batch = data.sequence_length * 8 if train.batch_tokens == AUTO else int(train.batch_tokens)
        return _Budget(round(train.steps * batch * data.trained_per_row / data.sequence_length), "steps", train.steps)
    if train.epochs is not None:
        return _Budget(
            round(train.epochs * data.train_tokens), f"{train.epochs:g} epochs of {data.train_tokens:,} tokens"
        )
    if train.time is not None:
        seconds = train.time.value
        compiled = train.compile is True or (
            train.compile == AUTO and rules.choose_compile(machine, eager_seconds=seconds)[0] is True
        )
        rate = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=compiled)
        return _Budget(max(1, round(seconds * rate)), f"{train.time} at a predicted {rate:,.0f} tokens/s")
    if train.tokens in (None, AUTO):
        tokens, reason = rules.choose_tokens(model, data)
        return _Budget(int(tokens), reason)
    return _Budget(int(train.tokens), f"{train.tokens} tokens")


def _rows(batch_tokens: int, data: DataFacts, ranks: int) -> int:
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
        raise ConfigError(
            f"train.batch_tokens {batch_tokens} is {rows} rows, which {ranks} processes cannot share equally",
            hint=f"use train.batch_tokens={' or '.join(map(str, sizes))}, or {_nearest_divisor(rows, ranks)} processes",
        )
    return rows


def _settle_steps(ledger: _Ledger, recipe: Recipe, budget: _Budget, trained_per_step: float) -> int:
    if budget.steps is not None:
        return budget.steps
    steps, reason = rules.choose_steps(trained_per_step, tokens=budget.tokens, what=budget.what)
    for key in ("tokens", "epochs", "time"):
        if getattr(recipe.train, key) is not None:
            ledger.decisions.append(Decision(f"train.{key}", None, "became train.steps"))
    ledger.decisions.append(Decision("train.steps", steps, reason))
    return int(steps)


def _nearest_divisor(rows: int, wanted: int) -> int:
    return min((d for d in range(1, rows + 1) if rows % d == 0), key=lambda d: (abs(d - wanted), d))


def _settle_schedule(ledger: _Ledger, recipe: Recipe, steps: int) -> None:
    schedule = recipe.optim.schedule
    if schedule.warmup == AUTO:
        warmup, reason = rules.choose_warmup(steps)
        ledger.decisions.append(Decision("optim.schedule.warmup", f"{warmup} steps", reason))


def _settle_evaluation(ledger: _Ledger, recipe: Recipe, data: DataFacts, steps: int, tokens: int) -> None:
    if data.validation_rows == 0:
        return
    every = recipe.train.eval_every
    if every == AUTO:
        count, reason = rules.choose_evaluation(steps)
        ledger.decisions.append(Decision("train.eval_every", f"{count} steps", reason))
        every = Duration(int(count), "steps")
    if recipe.train.eval_tokens == AUTO:
        evaluations = 10
        if isinstance(every, Duration) and every.unit == "steps":
            evaluations = max(1, steps // int(every.value))
        rows, reason = rules.choose_evaluation_rows(data, tokens=tokens, evaluations=evaluations)
        ledger.decisions.append(Decision("train.eval_tokens", rows, reason))


def _memory_settings(
    recipe: Recipe, machine: MachineFacts, data: DataFacts, precision: str, micro_rows: int, micro_batches: int
) -> MemorySettings:
    section = recipe.memory
    recompute = section.recompute if isinstance(section.recompute, str) else section.recompute.every
    settings = MemorySettings(
        micro_rows,
        data.sequence_length,
        micro_batches=micro_batches,
        precision=precision,
        optimizer=recipe.optim.name,
        update=recipe.precision.update if isinstance(recipe.precision, BF16PurePrecision) else "master",
        offload_activations=section.offload_activations,
        optimizer_state=section.optimizer_state,
        parameters=section.parameters,
        host_is_device=machine.kind != "cuda",
    )
    return settings.with_recompute(recompute)


def _under(settings: MemorySettings, layout: Layout) -> MemorySettings:
    return replace(settings, zero=layout.zero, shard=layout.shard, accumulate=layout.accumulate, gather=layout.gather)


def _limits(machine: MachineFacts, nvme_path: str | None) -> MemoryLimits:
    disk = None if nvme_path is None else free_disk_bytes(nvme_path) // machine.ranks
    if machine.kind != "cuda":
        return MemoryLimits(machine.name, machine.memory_bytes, disk=disk)
    return MemoryLimits(machine.name, machine.host_bytes or machine.memory_bytes, machine.memory_bytes, disk)
