"""`trainwright memory RECIPE [key=value ...]`: where a run's memory would go, and with --measure where it does."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.base.text import align_columns, human_bytes

if TYPE_CHECKING:
    from trainwright.comm.layout import Layout
    from trainwright.config import Recipe
    from trainwright.memory import MemoryReport
    from trainwright.models import ModelConfig
    from trainwright.planner import ModelFacts
    from trainwright.planner.memory import MemorySettings

__all__ = ["memory"]

DEGREES = ("tensor", "context", "expert", "stages")
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
    """Predict the memory of a run for every ZeRO stage of its layout; nothing is built unless it is measured."""
    worlds = _worlds(ranks)
    from trainwright.config import load_recipe

    subject = _subject(load_recipe(recipe, list(overrides or ())))
    rows, refused = _predictions(subject, worlds)
    if as_json:
        counted = {"counted": _measured(subject)[0].to_dict()} if measure else {}
        found = {
            "micro_batch": subject.settings.micro_rows,
            "predicted": rows,
            "refused": {str(world): reason for world, reason in refused.items()},
            "problem": subject.problem,
            **counted,
        }
        print(json.dumps(found, ensure_ascii=False))
        return
    _show(subject, rows, refused)
    if measure:
        report, predicted = _measured(subject)
        print(f"\ncounted in this process after a backward pass\n{report.table(predicted)}")


@dataclass(frozen=True)
class _Subject:
    """What is predicted. batch_rows: of a step. layout: on the fewest ranks that its degrees take. problem: why the run
    as it is would be refused, if it would."""

    recipe: Recipe
    config: ModelConfig
    facts: ModelFacts
    settings: MemorySettings
    batch_rows: int
    layout: Layout
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
    from trainwright.data import build_spec
    from trainwright.planner import resolve
    from trainwright.planner.model_facts import model_facts
    from trainwright.trainer.estimate import estimate_data
    from trainwright.trainer.model_section import model_source
    from trainwright.trainer.settle import machine_facts

    source = model_source(loaded.recipe.model)
    data = estimate_data(build_spec(loaded.recipe.data, model_tokenizer=source.tokenizer))
    config = source.config_for(data.vocab_size, data.sequence_length)
    facts = model_facts(config, data.sequence_length, loaded.recipe)
    # The fewest ranks that the degrees of the recipe take: one, unless the model is divided.
    machine = replace(machine_facts(), ranks=loaded.recipe.parallel.model_ranks * _row_ranks(loaded.recipe))
    problem = None
    try:
        plan = resolve(loaded.recipe, machine, data, facts)
    except MemoryLimitError as error:
        problem = str(error)
        plan = resolve(loaded.recipe, replace(machine, memory_bytes=UNLIMITED, host_bytes=None), data, facts)
    recipe = loaded.resolve(plan.updates()).recipe
    settings = _settings(recipe, plan.micro_rows, data.sequence_length, host_is_device=machine.kind != "cuda")
    return _Subject(recipe, config, facts, settings, plan.batch_rows, plan.layout, problem)


def _row_ranks(recipe: Recipe) -> int:
    """Ranks that experts and shards need beyond those of sequences: all of them are among the same data ranks."""
    section = recipe.parallel
    if section.expert == "auto" or section.context == "auto":
        return 1
    shard = section.shard if isinstance(section.shard, int) else 1
    return math.lcm(section.expert, section.context, shard) // section.context


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
        mlp_chunks=1 if section.mlp_chunks == "auto" else section.mlp_chunks,
        compiled=recipe.train.compile is True,
        host_is_device=host_is_device,
    ).with_recompute(section.recompute if isinstance(section.recompute, str) else section.recompute.every)


def _predictions(subject: _Subject, worlds: list[int]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """One row for each number of ranks and stage, and why there is none for a number that cannot form the layout."""
    from dataclasses import asdict

    from trainwright.planner.memory import predict_rank_memory
    from trainwright.planner.wire import wire_bytes

    rows, refused = [], {}
    for world in worlds:
        try:
            layouts = _layouts(subject, world)
        except ConfigError as error:
            refused[world] = error.message
            continue
        for layout in layouts:
            passes = max(1, subject.batch_rows // (subject.settings.micro_rows * layout.rows))
            settings = replace(subject.settings, micro_batches=passes).under(layout)
            memory = predict_rank_memory(subject.facts, settings)
            sent = sum(wire_bytes(subject.facts, settings, layout, wire=subject.recipe.comm.wire).values())
            degrees = {name: getattr(layout, name) for name in ("tensor", "context", "expert")}
            shape = {"ranks": world, "zero": layout.zero, **degrees, "stages": layout.pipeline.stages}
            rows.append({**shape, **asdict(memory), "total": memory.device, "sent": sent})
    return rows, refused


def _layouts(subject: _Subject, world: int) -> list[Layout]:
    """The layout of the recipe at every ZeRO stage that so many ranks can have; ranks on their own have no stages."""
    from trainwright.planner.legality import check_layout

    wanted = subject.recipe.parallel
    data = wanted.row_ranks(world) * subject.layout.context
    found = []
    for zero in range(4) if data > 1 else range(1):
        shard = wanted.shard if isinstance(wanted.shard, int) and data % wanted.shard == 0 else data
        accumulate, gather = "local" if zero < 2 else "sharded", "step" if zero < 3 else "micro_batch"
        if zero >= 2 and wanted.accumulate != "auto":
            accumulate = wanted.accumulate
        if zero == 3 and wanted.gather != "auto":
            gather = wanted.gather
        layout = subject.layout.draft(
            world,
            zero,
            shard if zero else 1,
            accumulate=accumulate,
            gather=gather,
            **{name: getattr(subject.layout, name) for name in ("tensor", "context", "ulysses", "expert", "pipeline")},
        )
        found.append(check_layout(layout, subject.facts))
    return found


def _show(subject: _Subject, rows: list[dict[str, Any]], refused: dict[int, str]) -> None:
    settings = subject.settings
    training = subject.facts.training
    if training is not None and not training.is_whole:
        print(f"trained: {training.what}")
    print(
        f"{subject.facts.parameters:,} parameters, {settings.precision}, {settings.optimizer},"
        f" recompute {settings.recompute}; {settings.micro_rows} x {settings.sequence_length} tokens at a time\n"
    )
    away = [kind for kind in ("host", "disk", "sent") if any(row[kind] for row in rows)]
    degrees = [name for name in DEGREES if any(row[name] > 1 for row in rows)]
    table: list[list[str]] = [["ranks", "zero", *degrees, *COLUMNS, "each rank", *away]]
    for row in rows:
        sizes = [human_bytes(row[kind]) for kind in (*COLUMNS, "total", *away)]
        table.append([*(str(row[name]) for name in ("ranks", "zero", *degrees)), *sizes])
    print("\n".join(align_columns(table, right=range(len(table[0])))))
    if any(row["sent"] for row in rows):
        print("\nsent: by each rank, per step")
    for reason in refused.values():
        print(f"\n{reason}")
    if subject.problem is not None:
        ranks = subject.layout.world
        where = "in one process" if ranks == 1 else f"on each of {ranks} ranks"
        print(f"\non this machine, {where}, this would be refused:\n{subject.problem}")


def _measured(subject: _Subject) -> tuple[MemoryReport, dict[str, int]]:
    """Counted bytes of a real step at full memory (gradients, state and activations), and their prediction."""
    import torch

    from trainwright.base.device import device_facts
    from trainwright.comm import ALONE
    from trainwright.engine import compile_blocks, precision
    from trainwright.engine.assemble import hold, recompute
    from trainwright.engine.materialise import materialise
    from trainwright.engine.options import optimizer_options
    from trainwright.memory import ActivationMeter, count_memory, place_state
    from trainwright.models import build_model
    from trainwright.models.initialise import initial_values
    from trainwright.optim import build_optimizer
    from trainwright.optim.groups import freeze
    from trainwright.planner.memory import predict_rank_memory
    from trainwright.tasks import CausalLM
    from trainwright.trainer.adapters import adapt

    recipe, settings = subject.recipe, subject.settings
    device = torch.device(device_facts().kind)
    policy = precision(recipe.precision.name)
    seed = recipe.train.seed
    options = optimizer_options(recipe.optim, recipe.precision, seed=seed, freeze=recipe.train.freeze)
    model = build_model(subject.config, device="meta", dtype=policy.parameter_dtype).train()
    model.set_attention_backend(recipe.model.attention)
    first = initial_values(subject.config, seed)
    values = adapt(model, recipe.adapter, first, compute=policy.compute_dtype, device=device, seed=seed)
    freeze(model.named_parameters(remove_duplicate=False), options)
    hold(model, policy, recipe.precision, ALONE)
    materialise(model, device, values)
    recompute(model, recipe.memory, ALONE)
    if recipe.train.compile is True:
        compile_blocks(model)
    optimizer = build_optimizer(model.named_parameters(remove_duplicate=False), options)
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
