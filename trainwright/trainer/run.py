"""A run in memory: everything `build` made, where it stands, and what it saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainwright.base.device import peak_memory_bytes
from trainwright.base.errors import CheckpointError
from trainwright.base.events import emit
from trainwright.base.protocols import StateDict
from trainwright.checkpoint import Checkpointer
from trainwright.comm import Ranks
from trainwright.config import LoadedRecipe, Recipe
from trainwright.data import Loader, TokenDataset, Tokenizer, evaluation_batches, evaluation_rows, fit_and_score
from trainwright.engine import Engine
from trainwright.launch import Heartbeat
from trainwright.models.adapters import BaseModel, adapter_report
from trainwright.models.embedding_noise import EmbeddingNoise
from trainwright.models.fields import config_fields
from trainwright.monitor import ThroughputMeter
from trainwright.optim import SpikeGuard
from trainwright.planner import Plan
from trainwright.tasks import Task
from trainwright.trainer.cadence import Cadence
from trainwright.trainer.callbacks import Callback
from trainwright.trainer.evaluation import Evaluation
from trainwright.trainer.run_folder import RunFolder
from trainwright.trainer.state import TrainState
from trainwright.trainer.task import Dataset
from trainwright.trainer.together import first_decides

__all__ = ["Run"]


@dataclass
class Run:
    """One run between `build` and its end.

    Attributes that are not parts: `stop_reason`, why training need not go on, ends the loop early and orderly when a
    callback sets it; `save_wanted` is set by a callback too, and asks for a checkpoint once all have seen the
    evaluation; `diverged` holds the reason when the guard says stop; `baselines` are validation losses of counting
    models on the same tokens; `base` is the model that adapters stand beside, where checkpoints name it instead of
    holding it.
    """

    loaded: LoadedRecipe
    plan: Plan
    folder: RunFolder
    ranks: Ranks
    device: torch.device
    pretrained: str | None
    base: BaseModel | None
    dataset: Dataset
    tokenizer: Tokenizer
    task: Task
    engine: Engine
    loader: Loader
    checkpointer: Checkpointer
    spikes: SpikeGuard
    callbacks: tuple[Callback, ...]
    log_cadence: Cadence
    evaluation_cadence: Cadence
    save_cadence: Cadence
    state: TrainState = field(default_factory=TrainState)
    last_evaluation: Evaluation | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    stop_reason: str | None = None
    save_wanted: bool = False
    diverged: str | None = None
    heartbeat: Heartbeat | None = None
    noise: EmbeddingNoise | None = None
    meter: ThroughputMeter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = ThroughputMeter(flops_per_step=self.plan.flops_per_step, peak_flops=self.plan.peak_flops)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def model_fields(self) -> StateDict:
        """The model's configuration as JSON, from which an equal model is built."""
        return config_fields(self.engine.model.config)

    def start(self) -> None:
        """Count the baselines, allocate and start what runs beside the loop; called once, after a restore."""
        dataset = self.dataset
        if isinstance(dataset, TokenDataset) and self.validation_rows and self.task.name == "causal_lm":
            rows = evaluation_rows(dataset, limit_rows=self.validation_rows)
            self.baselines = first_decides(self.ranks, lambda: fit_and_score(dataset, rows=rows).to_dict())
        self.checkpointer.prepare(self.state_dict())
        for callback in self.callbacks:
            callback.on_run_start(self)

    # --- data ---

    def next_batch(self) -> tuple[dict[str, Tensor], float]:
        """The batch of the coming step, and how many seconds training waited for it."""
        began = time.perf_counter()
        batch = next(self.loader)
        return batch, time.perf_counter() - began

    def inputs_of(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens that the model reads of a step's batch, without padding: this rank's rows, times the ranks that have
        others."""
        lengths = batch.get("lengths")
        own = batch["input_ids"].numel() if lengths is None else int(lengths.sum())
        if "text_lengths" in batch:  # further texts of the same rows
            own += int(batch["text_lengths"].sum())
        return own * self.engine.data_parallel.mesh.rows[1]

    @property
    def validation_rows(self) -> int:
        """Rows of one evaluation, always the same ones; 0 where there is no validation."""
        if "validation" not in self.dataset.splits or self.recipe.train.eval_every == "never":
            return 0
        rows = self.dataset.rows("validation")
        wanted = self.recipe.train.eval_tokens
        if wanted == "all":
            return rows
        return min(rows, max(1, int(wanted) // self.recipe.data.sequence_length))

    def validation_batches(self) -> Iterator[dict[str, Tensor]] | None:
        """The evaluation's batches; None where there is no validation."""
        return self.batches_of("validation", self.validation_rows) if self.validation_rows else None

    def batches_of(self, split: str, limit_rows: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches of rows of a split, in the shape that training compiled for.

        limit_rows: so many, evenly spread; None takes all.
        """
        place, places = self.engine.data_parallel.mesh.rows
        batches = evaluation_batches(
            self.dataset,
            self.plan.micro_rows * places,
            split,
            rank=place,
            world=places,
            limit_rows=limit_rows,
            transform=getattr(self.task, "prepare_batch", None),
        )
        return (self._evaluated(batch) for batch in batches)

    def _evaluated(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.beat("evaluate")
        return {key: value.to(self.device) for key, value in batch.items()}

    # --- signs of life ---

    def beat(self, phase: str) -> None:
        """Say that this rank is alive and enters `phase`; whoever watches the ranks notices when it stays away."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.state.step, phase)

    def without_beats(self, phase: str) -> AbstractContextManager[None]:
        """Around long work that has no beats."""
        return contextlib.nullcontext() if self.heartbeat is None else self.heartbeat.paused(phase)

    # --- guard ---

    def guard(self, loss: float, grad_norm: float) -> bool:
        """Whether the step may be taken; notes why not."""
        decision = self.spikes.decide(loss, grad_norm)
        if decision.verdict == "ok":
            return True
        message = f"step {self.state.step + 1}: {decision.reason}"
        if decision.verdict == "stop":
            self.diverged = message
        else:
            emit("warning", message=f"{message}; the step is skipped", step=self.state.step + 1)
        return False

    # --- state ---

    def state_dict(self) -> StateDict:
        """The one dict that is saved: whatever a resumed run needs to go on bit for bit.

        The frozen weights of `base` are not in it. Its buffers are: a mixture's balance of experts moves unasked.
        """
        engine = self.engine.state_dict()
        of_base = self._of_base(engine["model"])
        engine["model"] = {name: value for name, value in engine["model"].items() if name not in of_base}
        return {
            "engine": engine,
            "train": self.state.state_dict(),
            "loader": self.loader.state_dict(),
            "spikes": self.spikes.state_dict(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of `state_dict`. Callbacks that are new since the save start fresh; lost ones are an error."""
        known = {callback.name: callback for callback in self.callbacks}
        lost = sorted(set(state["callbacks"]) - set(known))
        if lost:
            raise CheckpointError(
                f"the checkpoint holds state of callbacks that this run does not have: {', '.join(lost)}",
                hint="pass the same callbacks, or start a new run",
            )
        self.load_engine(state)
        self.state.load_state_dict(state["train"])
        self.loader.load_state_dict(state["loader"])
        self.spikes.load_state_dict(state["spikes"])
        for name, saved in state["callbacks"].items():
            known[name].load_state_dict(saved)

    def load_engine(self, state: StateDict) -> None:
        """The engine's part of a saved state, into an engine whose frozen weights are in place."""
        engine = state["engine"]
        frozen = self._of_base(self.engine.model.state_dict())
        self.engine.load_state_dict({**engine, "model": {**engine["model"], **frozen}})

    def _of_base(self, state: StateDict) -> StateDict:
        """Of a state of the model, the parameters that `base` holds too: those that nothing changes."""
        adapters = adapter_report(self.engine.model)
        if self.base is None or adapters is None:
            return {}
        buffers = {name for name, _ in self.engine.model.named_buffers()}
        return {name: value for name, value in state.items() if name not in buffers and adapters.is_frozen(name)}

    def save(self, *, final: bool = False) -> None:
        """Save now; a final save is on the disk when this returns."""
        meta = {
            "model": self.model_fields,
            "dataset": self.dataset.fingerprint,
            "tokens": self.state.tokens,
            "validation_loss": self.last_evaluation.loss if self.last_evaluation else None,
        }
        adapters = adapter_report(self.engine.model)
        if adapters is not None:
            meta["adapter"] = adapters.to_fields()
        if self.base is not None:
            meta["base"] = self.base.to_fields()
        self.beat("save")
        self.save_wanted = False
        self.state.seconds = self.ranks.broadcast_json(self.state.seconds)  # what is saved is the same on all ranks
        self.checkpointer.save(self.state.step, self.state_dict(), meta, required=final)

    # --- end ---

    @property
    def stopped_early(self) -> str | None:
        """Where and why a callback ended the run before its budget did; None where none did."""
        if self.stop_reason is None or self.state.step >= self.plan.steps:
            return None
        return f"stopped early at step {self.state.step:,}: {self.stop_reason}"

    def measured(self) -> dict[str, Any]:
        """What the run really cost, to stand beside the prediction."""
        return {
            "tokens_per_second": self.meter.tokens_per_second,
            "inputs_per_second": self.meter.inputs_per_second,
            "mfu": self.meter.mfu,
            "seconds": self.state.seconds,
            "memory_bytes": peak_memory_bytes(),
        }
