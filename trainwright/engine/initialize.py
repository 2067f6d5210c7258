"""`trainwright.initialize`: from a model and a configuration to an engine, for people with a loop of their own.

    engine, optimizer, loader, scheduler = trainwright.initialize(model=model, config=config)
    for batch in loader:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()

The configuration is Trainwright's own or a DeepSpeed JSON; the shape of the call is DeepSpeed's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trainwright.base.device import device_facts
from trainwright.base.errors import ConfigError
from trainwright.base.events import emit
from trainwright.comm import Ranks, start
from trainwright.comm.mesh import make_mesh
from trainwright.config import (
    ClientOptim,
    EngineConfig,
    LoadedEngineConfig,
    load_engine_config,
    resolve_batch,
)
from trainwright.engine.assemble import release_gradients
from trainwright.engine.client import ClientOptimizer, names_of, point_at
from trainwright.engine.divide import Sections, divide
from trainwright.engine.engine import Optimizer
from trainwright.engine.loader import EngineLoader
from trainwright.engine.names import optimized_parameters
from trainwright.engine.options import learning_rate_multiplier, optimizer_options, scaler_options
from trainwright.engine.own_loop import OwnLoopEngine
from trainwright.engine.precision import Precision, precision
from trainwright.engine.weigh import refuse_too_large
from trainwright.memory import place_state
from trainwright.models import Backbone
from trainwright.optim import GroupedOptimizer, LossScaler, build_optimizer
from trainwright.parallel.pipeline import parameter_names
from trainwright.parallel.synchronise import synchronise
from trainwright.planner import model_facts
from trainwright.planner.layout import choose_layout

__all__ = ["Initialized", "initialize"]

Config = Mapping[str, Any] | EngineConfig | str | Path | None
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]

ENDLESS = 1 << 62
"""Steps of a run of unknown length, for schedules that do not end with it."""


class Initialized(NamedTuple):
    """What `initialize` returns; unpacks as DeepSpeed's tuple does."""

    engine: OwnLoopEngine
    optimizer: Any
    loader: EngineLoader | None
    scheduler: Any


def initialize(
    *,
    model: nn.Module,
    config: Config = None,
    optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
    model_parameters: Iterable[nn.Parameter] | None = None,
    training_data: Any = None,
    lr_scheduler: Any | MakeScheduler | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    ranks: Ranks | None = None,
) -> Initialized:
    """Make an engine; every rank calls it alike.

    Args:
        model: any module, equal in structure on all ranks; rank 0's values are taken. It is changed in place: moved to
            the device, held in the precision's type, divided as `parallel` says.
        config: see `load_engine_config`: Trainwright's language or DeepSpeed's, as a dict, a path or base64.
        optimizer: a fresh torch optimizer over the model's parameters, or a callable that makes one; None builds that
            of `config.optim`, or none.
        model_parameters: what to train; None is everything that requires a gradient.
        training_data: a dataset, from which the loader is made.
        lr_scheduler: a torch scheduler over `optimizer`, or a callable that makes one; stepped by the engine.
        collate_fn: joins examples to a batch.
        ranks: the processes; None joins those that the environment names.

    Raises:
        ConfigError: the configuration contradicts itself, the arguments, or the number of processes.
        MemoryLimitError: parameters, gradients and optimizer state cannot fit; names the nearest setting that does.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = ranks or _join(config)
    loaded = load_engine_config(config, world=ranks.world)
    settings = loaded.config
    sizes = settings.batch
    batch = resolve_batch(
        sizes.global_,
        sizes.micro,
        sizes.accumulation,
        settings.parallel.row_ranks(ranks.world),
        all_ranks=ranks.world,
    )
    policy = precision(_precision_name(settings))
    facts = model_facts(model.config, model.config.max_position_embeddings) if isinstance(model, Backbone) else None
    layout = choose_layout(settings.parallel, ranks.world, accumulation=batch.accumulation, model=facts).layout

    refuse_too_large(model, settings, policy, layout, ranks, batch)

    before = _prepare_model(model, settings, policy, ranks, model_parameters)
    sections = Sections(settings.precision, settings.parallel, settings.comm, settings.memory)
    mesh = make_mesh(layout, ranks)
    divided = divide(model, mesh, policy, sections)
    made = _make_optimizer(model, settings, optimizer, before)
    placed = None
    if isinstance(made, GroupedOptimizer):
        placed = place_state(made, settings.memory.optimizer_state, folder=settings.memory.nvme_path)
    elif settings.memory.optimizer_state == "nvme":
        raise ConfigError("memory.optimizer_state is nvme, but the optimizer is yours", hint="name one in optim")
    section = settings.optim
    scheduled = isinstance(section, ClientOptim) and (section.lr is not None or section.schedule.name != "constant")
    scheduler = _make_scheduler(lr_scheduler, made, scheduled=scheduled)
    clip_norm = section.clip_norm if section is not None else None
    engine = OwnLoopEngine(
        model,
        made,
        multiplier=_multiplier(settings, made),
        precision=policy,
        data_parallel=divided.data_parallel,
        schedule=divided.schedule,
        cut=divided.cut,
        accumulation=batch.accumulation,
        clip_norm=clip_norm,
        skip_nonfinite=settings.on_nan == "skip",
        scaler=LossScaler(scaler_options(settings.precision)) if policy.scales_loss else None,
        stepping=release_gradients(made, settings.memory, layout, clip_norm=clip_norm, scales_loss=policy.scales_loss),
        placed=placed,
        scheduler=scheduler,
        batch=batch,
        loaded=loaded,
        owns_ranks=not running and ranks.world > 1,
    )
    loader = None
    if training_data is not None:
        loader = EngineLoader(training_data, batch.micro, mesh.rows, seed=settings.seed, collate_fn=collate_fn)
    if ranks.is_first:
        _say(loaded, layout.describe(), policy)
    return Initialized(engine, _torch_optimizer(made), loader, scheduler)


def _join(config: Config) -> Ranks:
    """The ranks, with the backend and timeout that the configuration names; sizes are checked later, with the world."""
    from trainwright.base.processes import process_environment

    comm = load_engine_config(config, world=process_environment().world).config.comm
    return start(backend=comm.backend, timeout=timedelta(seconds=comm.timeout.value))


def _precision_name(settings: EngineConfig) -> str:
    if settings.precision.name != "auto":
        return settings.precision.name
    return "bf16" if device_facts().bf16 else "fp32"


def _prepare_model(
    model: nn.Module,
    settings: EngineConfig,
    policy: Precision,
    ranks: Ranks,
    trained: Iterable[nn.Parameter] | None,
) -> dict[torch.Tensor, str]:
    """Everything before the division; returns the names of the parameters as they are now."""
    if policy.name == "fp8":
        from trainwright.engine.float8 import use_float8

        use_float8(model, settings.precision, ranks.device)
    if trained is not None:
        wanted = set(_listed(trained))
        strange = [p for p in wanted if p not in set(model.parameters())]
        if strange:
            raise ConfigError(f"model_parameters holds {len(strange)} parameters that are not the model's")
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in wanted)
    model.to(ranks.device)
    synchronise(model, ranks)
    return names_of(model)


def _listed(trained: Iterable[Any]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for entry in trained:
        if isinstance(entry, Mapping):
            raise ConfigError(
                "model_parameters holds parameter groups",
                hint="give groups their rates by optim.rules, or make the optimizer yourself and pass it",
            )
        found.append(entry[1] if isinstance(entry, tuple) else entry)
    return found


def _make_optimizer(
    model: nn.Module,
    settings: EngineConfig,
    given: torch.optim.Optimizer | MakeOptimizer | None,
    before: dict[torch.Tensor, str],
) -> Optimizer | None:
    section = settings.optim
    if given is None:
        if isinstance(section, ClientOptim):
            raise ConfigError("optim.name is client, but no optimizer was passed", hint="pass optimizer=...")
        if section is None:
            return None
        return build_optimizer(
            optimized_parameters(model),
            optimizer_options(section, settings.precision, seed=settings.seed),
            elsewhere=parameter_names(model),
        )
    if section is not None and not isinstance(section, ClientOptim):
        raise ConfigError(
            f"optim names {section.name}, and an optimizer was passed too", hint="keep one; optim.name=client is yours"
        )
    if isinstance(given, torch.optim.Optimizer):
        point_at(given, before, model)
        return _client(given, model, section)
    if not callable(given):
        raise ConfigError(f"optimizer is a {type(given).__name__}, expected a torch.optim.Optimizer or a callable")
    made = given([p for p in model.parameters() if p.requires_grad])
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"the optimizer callable returned a {type(made).__name__}, expected a torch.optim.Optimizer")
    return _client(made, model, section)


def _client(optimizer: torch.optim.Optimizer, model: nn.Module, section: ClientOptim | None) -> ClientOptimizer:
    if section is None:
        return ClientOptimizer(optimizer, model)
    scheduled = section.lr is not None or section.schedule.name != "constant"
    return ClientOptimizer(optimizer, model, scheduled=scheduled, lr=section.lr)


def _make_scheduler(given: Any, optimizer: Optimizer | None, *, scheduled: bool) -> Any:
    if given is None:
        return None
    if optimizer is None:
        raise ConfigError("an lr_scheduler was passed, but there is no optimizer")
    if isinstance(optimizer, GroupedOptimizer) or scheduled:
        raise ConfigError(
            "an lr_scheduler was passed, and optim has a schedule already",
            hint="use optim.schedule, or pass an optimizer of yours with the scheduler",
        )
    made = given
    if inspect.isroutine(given) or inspect.isclass(given):
        make: MakeScheduler = given
        made = make(_torch_optimizer(optimizer))
    if not hasattr(made, "step") or not hasattr(made, "state_dict"):
        raise ConfigError(f"lr_scheduler is a {type(made).__name__}, expected an object with step() and state_dict()")
    return made


def _multiplier(settings: EngineConfig, optimizer: Optimizer | None) -> Callable[[int], float]:
    section = settings.optim
    if section is None or optimizer is None:
        return lambda step: 1.0
    return learning_rate_multiplier(section.schedule, settings.total_steps or ENDLESS)


def _torch_optimizer(optimizer: Optimizer | None) -> Any:
    return optimizer.optimizer if isinstance(optimizer, ClientOptimizer) else optimizer


def _say(loaded: LoadedEngineConfig, layout: str, policy: Precision) -> None:
    emit("notice", message=f"engine: {layout}; precision {policy.name}")
    for note in loaded.notes:
        emit("notice", message=str(note))
