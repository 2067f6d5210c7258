"""Build a settled run: every part in the order in which it depends on the others, from callables, not names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from trainwright.base.errors import ConfigError
from trainwright.base.events import emit
from trainwright.base.units import Duration
from trainwright.checkpoint import Checkpointer
from trainwright.comm import Ranks
from trainwright.comm.layout import Layout
from trainwright.comm.mesh import Mesh, make_mesh
from trainwright.config import Recipe
from trainwright.data import Loader, load_tokenizer
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.engine import (
    Engine,
    Precision,
    learning_rate_multiplier,
    optimizer_options,
    precision,
    scaler_options,
)
from trainwright.engine.assemble import release_gradients
from trainwright.engine.divide import Divided, Sections, divide
from trainwright.engine.materialise import Values, materialise
from trainwright.engine.names import optimized_parameters
from trainwright.memory import place_state
from trainwright.models import build_model
from trainwright.models.adapters import BaseModel
from trainwright.models.backbone import Backbone
from trainwright.models.embedding_noise import attach_embedding_noise
from trainwright.models.importing import Pretrained
from trainwright.models.initialise import initial_values
from trainwright.optim import EMA, OptimizerOptions, SpikeGuard, SpikeOptions, build_optimizer
from trainwright.optim.groups import freeze
from trainwright.optim.loss_scale import LossScaler
from trainwright.parallel.pipeline import parameter_names
from trainwright.tasks import Task
from trainwright.trainer.adapters import adapt
from trainwright.trainer.best import best_callback
from trainwright.trainer.cadence import Cadence
from trainwright.trainer.callbacks import Callback, EarlyStopping
from trainwright.trainer.resume import Entered
from trainwright.trainer.run import Run
from trainwright.trainer.sampling import Sampling
from trainwright.trainer.settle import Settled
from trainwright.trainer.task import Dataset, make_task
from trainwright.trainer.together import first_decides

__all__ = ["build"]


def build(
    settled: Settled,
    entered: Entered,
    callbacks: Sequence[Callback],
    stack: contextlib.ExitStack,
    ranks: Ranks,
) -> Run:
    """Everything a run holds on this rank, entered into `stack` where it needs closing."""
    recipe, plan, dataset = settled.loaded.recipe, settled.plan, settled.dataset
    assert dataset is not None, "a dry run is not built"
    _set_determinism(recipe, settled.device)
    _refuse_second_pass(recipe, plan.layout)
    mesh = make_mesh(plan.layout, ranks)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    task = make_task(recipe, dataset, tokenizer, group=mesh.data.group)
    policy = precision(recipe.precision.name)
    divided = _divided_model(settled, mesh, policy, stack)
    alpha = recipe.train.neftune_alpha
    noise = None if alpha is None else attach_embedding_noise(divided.model, alpha)
    engine = _engine(settled, divided, policy, stack)
    loader = stack.enter_context(_loader(settled, dataset, mesh, task))
    checkpointer = stack.enter_context(
        Checkpointer(
            entered.folder.checkpoints,
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
            lock=entered.lock,
            ranks=ranks,
        )
    )
    tokens_per_epoch = dataset.facts("train").trained_tokens

    def cadence(every: Duration | str) -> Cadence:
        return Cadence(every if isinstance(every, Duration) else None, tokens_per_epoch=tokens_per_epoch)

    validated = "validation" in dataset.splits and recipe.train.eval_every != "never"
    best = best_callback(recipe, task, validated=validated)
    return Run(
        loaded=settled.loaded,
        plan=plan,
        folder=entered.folder,
        ranks=ranks,
        device=settled.device,
        pretrained=settled.pretrained,
        base=_base(settled, ranks),
        dataset=dataset,
        tokenizer=tokenizer,
        task=task,
        engine=engine,
        noise=noise,
        loader=loader,
        checkpointer=checkpointer,
        spikes=SpikeGuard(_spike_options(recipe)),
        callbacks=_callbacks(recipe, plan.layout, callbacks, cadence, best),
        log_cadence=cadence(recipe.monitor.log_every),
        evaluation_cadence=cadence(recipe.train.eval_every),
        save_cadence=cadence(recipe.checkpoint.every),
    )


def _divided_model(settled: Settled, mesh: Mesh, policy: Precision, stack: contextlib.ExitStack) -> Divided:
    """The model with its adapters, frozen parts without gradients, divided over the mesh, its weights in place."""
    recipe = settled.loaded.recipe
    model = _build_model(settled, policy)
    values = adapt(
        model,
        recipe.adapter,
        _values(settled),
        compute=policy.compute_dtype,
        device=settled.device,
        seed=recipe.train.seed,
    )
    freeze(model.named_parameters(remove_duplicate=False), _optimizer_options(recipe))
    sections = Sections(recipe.precision, recipe.parallel, recipe.comm, recipe.memory)
    divided = divide(model, mesh, policy, sections, compiled=bool(recipe.train.compile))
    stack.callback(divided.data_parallel.close)
    materialise(model, settled.device, values)
    return divided


def _optimizer_options(recipe: Recipe) -> OptimizerOptions:
    return optimizer_options(recipe.optim, recipe.precision, seed=recipe.train.seed, freeze=recipe.train.freeze)


def _engine(settled: Settled, divided: Divided, policy: Precision, stack: contextlib.ExitStack) -> Engine:
    """The engine of a divided model, with the optimizer of what is trained."""
    recipe, plan, model = settled.loaded.recipe, settled.plan, divided.model
    optimizer = build_optimizer(
        optimized_parameters(model),
        _optimizer_options(recipe),
        elsewhere=parameter_names(model),
    )
    placed = place_state(optimizer, recipe.memory.optimizer_state, folder=recipe.memory.nvme_path)
    if placed is not None:
        stack.callback(placed.close, keep=False)
    trained = [(name, parameter) for name, parameter in optimized_parameters(model) if parameter.requires_grad]
    return Engine(
        model,
        optimizer,
        multiplier=learning_rate_multiplier(recipe.optim.schedule, plan.steps, plan.tokens / plan.steps),
        precision=policy,
        data_parallel=divided.data_parallel,
        schedule=divided.schedule,
        cut=divided.cut,
        accumulation=plan.accumulation,
        clip_norm=recipe.optim.clip_norm,
        ema=EMA(trained, decay=recipe.train.ema.decay) if recipe.train.ema is not None else None,
        scaler=LossScaler(scaler_options(recipe.precision)) if policy.scales_loss else None,
        stepping=release_gradients(
            optimizer, recipe.memory, plan.layout, clip_norm=recipe.optim.clip_norm, scales_loss=policy.scales_loss
        ),
        placed=placed,
    )


def _loader(settled: Settled, dataset: Dataset, mesh: Mesh, task: Task) -> Loader:
    """Batches of this rank's rows."""
    recipe, plan = settled.loaded.recipe, settled.plan
    if isinstance(dataset, ExampleDataset):
        # Where shapes are compiled or handed on between ranks, all batches have one.
        dataset.padding.static = _one_shape(recipe, plan.layout)
    return Loader(
        dataset,
        plan.batch_rows,
        seed=recipe.train.seed,
        rank=mesh.rows[0],
        world=mesh.rows[1],
        transform=getattr(task, "prepare_batch", None),
        group_by_length=recipe.data.group_by_length,
    )


def _refuse_second_pass(recipe: Recipe, layout: Layout) -> None:
    if getattr(recipe.task, "r_drop", 0.0) and layout.pipeline.stages > 1:
        raise ConfigError(
            "task.r_drop sends every row through the model twice, and a pipeline hands each on once",
            hint="set task.r_drop=0, or parallel.pipeline.stages=1",
        )


def _one_shape(recipe: Recipe, layout: Layout) -> bool:
    return recipe.train.compile is True or layout.pipeline.stages > 1 or layout.context > 1 or layout.tensor > 1


def _set_determinism(recipe: Recipe, device: torch.device) -> None:
    """On CPU every kernel in use is deterministic for a fixed number of threads; on a GPU torch must be told."""
    torch.use_deterministic_algorithms(bool(recipe.train.deterministic) and device.type == "cuda")


def _build_model(settled: Settled, policy: Precision) -> Backbone:
    """The model on the meta device: weights come when it is divided."""
    # Parts that are kept in fp32 must not have been rounded before.
    kept = settled.loaded.recipe.precision.keep_fp32
    dtype = torch.float32 if kept else policy.parameter_dtype
    model = build_model(settled.model_config, device="meta", dtype=dtype)
    model.set_attention_backend(settled.loaded.recipe.model.attention)
    return model.train()


def _values(settled: Settled) -> Values:
    """Where the first weights come from; each rank reads or draws one parameter at a time and keeps its part."""
    seed = settled.loaded.recipe.train.seed
    if settled.pretrained is not None:
        pretrained = Pretrained(settled.pretrained, settled.model_config, seed=seed)
        for note in pretrained.notes:
            emit("notice", message=note)
        return pretrained.value
    if settled.loaded.recipe.adapter is not None:
        emit(
            "warning",
            message="the model starts at random, and what adapters stand beside stays as it is",
            hint="name a trained model with model.path or model.hf, or leave adapter out",
        )
    return initial_values(settled.model_config, seed)


def _base(settled: Settled, ranks: Ranks) -> BaseModel | None:
    """The model that adapters stand beside, for checkpoints to name; None where they hold all that a run has."""
    adapter, folder = settled.loaded.recipe.adapter, settled.pretrained
    if adapter is None or adapter.name == "peft" or folder is None:
        return None
    seed = settled.loaded.recipe.train.seed
    return BaseModel(**first_decides(ranks, lambda: BaseModel.read(folder, seed=seed).to_fields()))


def _spike_options(recipe: Recipe) -> SpikeOptions:
    train = recipe.train
    return SpikeOptions(
        on_nonfinite=train.on_nan,
        on_spike=train.on_spike,
        sigmas=train.spike.sigma,
        window=train.spike.window,
        min_history=min(32, train.spike.window),
        max_skips=train.max_skips,
    )


def _callbacks(
    recipe: Recipe,
    layout: Layout,
    given: Sequence[Callback],
    cadence: Callable[[Duration | str], Cadence],
    best: Callback,
) -> tuple[Callback, ...]:
    """The recipe's own callbacks, then the caller's; names must differ because they key the saved state."""
    built: list[Callback] = [best]
    if recipe.train.early_stopping is not None:
        built.append(EarlyStopping(**dict(recipe.train.early_stopping)))
    if recipe.run.sample is not None:
        if layout.pipeline.stages > 1:
            raise ConfigError(
                "run.sample asks for text during training, and no rank of a pipeline has the whole model",
                hint="set run.sample=null; `trainwright generate` writes with the finished run's model",
            )
        built.append(Sampling(recipe.run.sample, cadence(recipe.run.sample.every)))
    built.extend(given)
    names = [callback.name for callback in built]
    if len(set(names)) != len(names) or "" in names:
        raise ConfigError(f"callbacks need distinct names that are not empty, seen {names}")
    return tuple(built)
