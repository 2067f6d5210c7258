"""`trainwright memory RECIPE [key=value ...]`: where a run's memory would go, and with --measure where it does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.base.text import align_columns, human_bytes

if TYPE_CHECKING:
    from trainwright.config import Recipe
    from trainwright.memory import MemoryReport
    from trainwright.models import ModelConfig
    from trainwright.planner import ModelFacts
    from trainwright.planner.memory import MemorySettings

__all__ = ["memory"]

COLUMNS = ("parameters", "gathered", "gradients", "optimizer", "activations", "transfers")
UNLIMITED = 1 << 60


def memory(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, a run folder, or a built-in name such as stdlib.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values over the recipe's: train.micro_batch=2.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of processes to predict for.")] = "1,2,4,8",
    measure: Annotated[
        bool, typer.Option("--measure", help="Take two real steps in this process and count, beside the prediction.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Predict the memory of a run for every ZeRO stage; nothing is built unless it is measured."""
    worlds = _worlds(ranks)
    from trainwright.config import load_recipe

    subject = _subject(load_recipe(recipe, list(overrides or ())))
    rows = _predictions(subject, worlds)
    if as_json:
        counted = {"counted": _measured(subject)[0].to_dict()} if measure else {}
        found = {"micro_batch": subject.settings.micro_rows, "predicted": rows, "problem": subject.problem, **counted}
        print(json.dumps(found, ensure_ascii=False))
        return
    _show(subject, rows)
    if measure:
        report, predicted = _measured(subject)
        print(f"\ncounted in this process after a backward pass\n{report.table(predicted)}")


@dataclass(frozen=True)
class _Subject:
    """What is predicted. problem: why the run as it is would be refused, if it would. batch_rows: of a step."""

    recipe: Recipe
    config: ModelConfig
    facts: ModelFacts
    settings: MemorySettings
    batch_rows: int
    problem: str | None


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise ConfigError(f"--ranks is {text!r}, expected numbers of processes", hint="for example --ranks 1,2,8")
    return worlds


def _subject(loaded: Any) -> _Subject:
    """Settle what decides about memory, as training would, but without refusing what does not fit."""
    from dataclasses import replace

    from trainwright.data import build_spec
    from trainwright.models import count_flops, count_parameters
    from trainwright.planner import ModelFacts, resolve
    from trainwright.trainer.estimate import estimate_data
    from trainwright.trainer.model_section import model_source
    from trainwright.trainer.settle import machine_facts

    source = model_source(loaded.recipe.model)
    data = estimate_data(build_spec(loaded.recipe.data, model_tokenizer=source.tokenizer))
    config = source.config_for(data.vocab_size, data.sequence_length)
    facts = ModelFacts(
        parameters=count_parameters(config),
        flops_per_token=count_flops(config, data.sequence_length),
        layers=config.num_layers,
        width=config.hidden_size,
        vocab_size=config.vocab_size,
    )
    machine = machine_facts()
    problem = None
    try:
        plan = resolve(loaded.recipe, machine, data, facts)
    except MemoryLimitError as error:
        problem = str(error)
        plan = resolve(loaded.recipe, replace(machine, memory_bytes=UNLIMITED), data, facts)
    recipe = loaded.resolve(plan.updates()).recipe
    settings = _settings(recipe, plan.micro_rows, data.sequence_length, host_is_device=machine.kind != "cuda")
    return _Subject(recipe, config, facts, settings, plan.batch_rows, problem)


def _settings(recipe: Recipe, micro_rows: int, sequence_length: int, *, host_is_device: bool) -> MemorySettings:
    from trainwright.config.precision_section import BF16PurePrecision
    from trainwright.planner.memory import MemorySettings

    section = recipe.memory
    return MemorySettings(
        micro_rows,
        sequence_length,
        precision=recipe.precision.name,
        optimizer=recipe.optim.name,
        update=recipe.precision.update if isinstance(recipe.precision, BF16PurePrecision) else "master",
        offload_activations=section.offload_activations,
        optimizer_state=section.optimizer_state,
        parameters=section.parameters,
        compiled=recipe.train.compile is True,
        host_is_device=host_is_device,
    ).with_recompute(section.recompute if isinstance(section.recompute, str) else section.recompute.every)


def _predictions(subject: _Subject, worlds: list[int]) -> list[dict[str, int]]:
    """One row for each number of ranks and stage; a process on its own has no stages."""
    from dataclasses import asdict, replace

    from trainwright.planner.memory import predict_rank_memory

    rows = []
    wanted = subject.recipe.parallel
    for world in worlds:
        for zero in range(4) if world > 1 else range(1):
            shard = wanted.shard if isinstance(wanted.shard, int) and world % wanted.shard == 0 else world
            accumulate, gather = "local" if zero < 2 else "sharded", "step" if zero < 3 else "micro_batch"
            if zero >= 2 and wanted.accumulate != "auto":
                accumulate = wanted.accumulate
            if zero == 3 and wanted.gather != "auto":
                gather = wanted.gather
            settings = replace(
                subject.settings,
                zero=zero,
                shard=shard if zero else 1,
                micro_batches=max(1, subject.batch_rows // (subject.settings.micro_rows * world)),
                accumulate=accumulate,
                gather=gather,
            )
            memory = predict_rank_memory(subject.facts, settings)
            rows.append({"ranks": world, "zero": zero, **asdict(memory), "total": memory.device})
    return rows


def _show(subject: _Subject, rows: list[dict[str, int]]) -> None:
    settings = subject.settings
    print(
        f"{subject.facts.parameters:,} parameters, {settings.precision}, {settings.optimizer},"
        f" recompute {settings.recompute}; {settings.micro_rows} x {settings.sequence_length} tokens at a time\n"
    )
    away = [kind for kind in ("host", "disk") if any(row[kind] for row in rows)]
    table: list[list[str]] = [["ranks", "zero", *COLUMNS, "each rank", *away]]
    for row in rows:
        sizes = [human_bytes(row[kind]) for kind in (*COLUMNS, "total", *away)]
        table.append([str(row["ranks"]), str(row["zero"]), *sizes])
    print("\n".join(align_columns(table, right=range(len(table[0])))))
    if subject.problem is not None:
        print(f"\non this machine, in one process, this would be refused:\n{subject.problem}")


def _measured(subject: _Subject) -> tuple[MemoryReport, dict[str, int]]:
    """Counted bytes of a real step at full memory (gradients, state and activations), and their prediction."""
    import torch

    from trainwright.base.device import device_facts
    from trainwright.comm import ALONE
    from trainwright.engine import compile_blocks, precision
    from trainwright.engine.assemble import hold, recompute
    from trainwright.engine.options import optimizer_options
    from trainwright.memory import ActivationMeter, count_memory, place_state
    from trainwright.models import build_model
    from trainwright.optim import build_optimizer
    from trainwright.planner.memory import predict_rank_memory
    from trainwright.tasks import CausalLM

    recipe, settings = subject.recipe, subject.settings
    device = torch.device(device_facts().kind)
    policy = precision(recipe.precision.name)
    model = build_model(subject.config, device=device, dtype=policy.parameter_dtype).train()
    model.set_attention_backend(recipe.model.attention)
    hold(model, policy, recipe.precision, ALONE)
    recompute(model, recipe.memory, ALONE)
    if recipe.train.compile is True:
        compile_blocks(model)
    optimizer = build_optimizer(
        model.named_parameters(), optimizer_options(recipe.optim, recipe.precision, seed=recipe.train.seed)
    )
    placed = place_state(optimizer, recipe.memory.optimizer_state, folder=recipe.memory.nvme_path)
    task = CausalLM(compiled=recipe.train.compile is True)
    shape = (settings.micro_rows, settings.sequence_length)
    ids = torch.randint(0, subject.config.vocab_size, shape, device=device)
    for last in (False, True):  # the first step makes the optimizer's state
        with ActivationMeter(model) as meter, policy.autocast(device.type):
            output = task.loss(model, {"input_ids": ids, "labels": ids})
        activations, copies = meter.activations, meter.weight_copies
        output.loss_sum.backward()
        if not last:
            optimizer.step(gradient_factor=1.0 / ids.numel())
            optimizer.zero_grad(set_to_none=True)
    report = count_memory(
        model,
        optimizer,
        activations=activations,
        weight_copies=copies,
        on_disk=0 if placed is None else placed.moved_bytes if recipe.memory.optimizer_state == "nvme" else 0,
    )
    if placed is not None:
        placed.close(keep=False)
    memory = predict_rank_memory(subject.facts, settings)
    predicted = {kind: getattr(memory, kind) for kind in ("parameters", "gradients", "optimizer", "activations")}
    # In one process the whole copies are those that autocast makes.
    return report, {**predicted, "weight_copies": memory.gathered, "total": memory.device}
