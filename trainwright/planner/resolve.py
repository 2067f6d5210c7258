"""Resolve a recipe: apply the rules in their order to every "auto", and predict what the result will cost."""

from __future__ import annotations

from dataclasses import asdict

from trainwright.base.units import Duration
from trainwright.config import Recipe
from trainwright.config.optim_section import Muon
from trainwright.planner import rules
from trainwright.planner.cost import pipeline_share, predict_tokens_per_second
from trainwright.planner.divide import Question, divide
from trainwright.planner.facts import DataFacts, MachineFacts, ModelFacts
from trainwright.planner.ledger import AUTO, Budget, Ledger
from trainwright.planner.memory_fit import refuse_before_allocating
from trainwright.planner.plan import Decision, Plan, Prediction
from trainwright.planner.tuning import TuningFacts
from trainwright.planner.wire import wire_bytes

__all__ = ["resolve"]


def resolve(
    recipe: Recipe, machine: MachineFacts, data: DataFacts, model: ModelFacts, tuning: TuningFacts | None = None
) -> Plan:
    """Turn every "auto" of `recipe` into a value with a reason.

    Args:
        tuning: what the model starts from and learns; None is a language model from scratch.

    Raises:
        ConfigError: sizes that do not divide, or a budget that trains nothing.
        MemoryLimitError: the weights, gradients and optimizer state alone do not fit.
    """
    ledger = Ledger()
    train = recipe.train
    tuning = tuning or TuningFacts()
    precision = ledger.settle("precision", recipe.precision.name, lambda: rules.choose_precision(machine))
    dtype = "fp32" if precision == "fp32" else "bf16"
    ledger.settle("train.threads", train.threads, lambda: rules.choose_threads(machine))
    ledger.settle("train.deterministic", train.deterministic, lambda: rules.choose_deterministic(machine))

    # Computing goes by positions, budgets and losses by what is trained.
    model = model.times(data.computed_per_trained)
    eager = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=False)
    budget = _token_budget(recipe, model, machine, data, dtype, eager, tuning)
    divided = divide(Question(recipe, machine, data, model, precision, budget))
    ledger.decisions.extend(divided.ledger.decisions)
    layout, batch, steps, memory = divided.layout, divided.batch, divided.steps, divided.memory
    trained = batch.rows * data.trained_per_row
    tokens = round(steps * trained)
    compiled = ledger.settle(
        "train.compile",
        train.compile,
        lambda: rules.choose_compile(machine, eager_seconds=tokens / eager, native=model.native),
    )
    ledger.settle(
        "optim.lr",
        recipe.optim.lr,
        lambda: rules.choose_learning_rate(
            model, tokens, optimizer=_update_kind(recipe), tuning=tuning, records=data.records
        ),
    )
    ledger.settle("optim.weight_decay", recipe.optim.weight_decay, lambda: rules.choose_weight_decay(tuning))
    _settle_schedule(ledger, recipe, steps, tuning)
    _settle_evaluation(ledger, recipe, data, steps, tokens)

    refuse_before_allocating(memory, divided.limits, divided.others())
    rate = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=bool(compiled))
    rate *= pipeline_share(layout.pipeline, batch.run or divided.settings.micro_batches)
    return Plan(
        decisions=tuple(ledger.decisions),
        steps=steps,
        batch_rows=batch.rows,
        micro_rows=batch.micro_rows,
        tokens=tokens,
        parameters=model.parameters,
        trains=None if model.training is None or model.training.is_whole else model.training.what,
        flops_per_token=model.run_flops,
        peak_flops=machine.ranks * (machine.peak.get(dtype) or machine.peak["fp32"]),
        machine=asdict(machine),
        data=asdict(data),
        prediction=Prediction(
            tokens_per_second=rate * data.learned_share,
            step_seconds=trained / rate,
            total_seconds=tokens / rate,
            memory={**memory.kinds(), "total": memory.device},
            wire=wire_bytes(model, divided.settings, layout, wire=recipe.comm.wire),
        ),
        layout=layout,
    )


def _update_kind(recipe: Recipe) -> str:
    """The optimizer as the learning-rate rule tells them apart: Muon has two scalings of its update."""
    optim = recipe.optim
    return "muon_original" if isinstance(optim, Muon) and optim.lr_adjust == "original" else optim.name


def _token_budget(
    recipe: Recipe,
    model: ModelFacts,
    machine: MachineFacts,
    data: DataFacts,
    dtype: str,
    eager: float,
    tuning: TuningFacts,
) -> Budget:
    train = recipe.train
    if train.steps is not None:
        batch = data.sequence_length * 8 if train.batch_tokens == AUTO else int(train.batch_tokens)
        return Budget(round(train.steps * batch * data.trained_per_row / data.sequence_length), "steps", train.steps)
    if train.epochs is not None:
        return Budget(
            round(train.epochs * data.train_tokens), f"{train.epochs:g} epochs of {data.train_tokens:,} {data.counted}"
        )
    if train.time is not None:
        seconds = train.time.value
        compiled = train.compile is True or (
            train.compile == AUTO
            and rules.choose_compile(machine, eager_seconds=seconds, native=model.native)[0] is True
        )
        rate = machine.ranks * predict_tokens_per_second(model, machine, dtype=dtype, compiled=compiled)
        return Budget(max(1, round(seconds * rate)), f"{train.time} at a predicted {rate:,.0f} {data.counted}/s")
    if train.tokens in (None, AUTO) and data.records:
        epochs, reason = rules.choose_epochs(tuning)
        return Budget(
            round(int(epochs) * data.train_tokens), f"{epochs} epochs, {reason}; {data.train_tokens:,} {data.counted}"
        )
    if train.tokens in (None, AUTO):
        tokens, reason = rules.choose_tokens(model, data)
        return Budget(int(tokens), reason)
    return Budget(int(train.tokens), f"{train.tokens} {data.counted}")


def _settle_schedule(ledger: Ledger, recipe: Recipe, steps: int, tuning: TuningFacts) -> None:
    schedule = recipe.optim.schedule
    if schedule.warmup == AUTO:
        warmup, reason = rules.choose_warmup(steps, tuning)
        ledger.decisions.append(Decision("optim.schedule.warmup", f"{warmup} steps", reason))


def _settle_evaluation(ledger: Ledger, recipe: Recipe, data: DataFacts, steps: int, tokens: int) -> None:
    if data.validation_rows == 0:
        return
    every = recipe.train.eval_every
    if every == AUTO:
        count, reason = rules.choose_evaluation(steps, data, tokens=tokens)
        ledger.decisions.append(Decision("train.eval_every", f"{count} steps", reason))
        every = Duration(int(count), "steps")
    if recipe.train.eval_tokens == AUTO:
        evaluations = 10
        if isinstance(every, Duration) and every.unit == "steps":
            evaluations = max(1, steps // int(every.value))
        rows, reason = rules.choose_evaluation_rows(data, tokens=tokens, evaluations=evaluations)
        ledger.decisions.append(Decision("train.eval_tokens", rows, reason))
