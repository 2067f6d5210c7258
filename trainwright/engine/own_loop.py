"""The engine for a loop of one's own: DeepSpeed's names for what such loops read, and checkpoints in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.checkpoint import Checkpointer
from trainwright.comm import stop
from trainwright.config import BatchSizes, LoadedEngineConfig
from trainwright.engine.client import ClientOptimizer
from trainwright.engine.consolidate import readable_weights
from trainwright.engine.engine import Engine, Guard, LossSum, StepReport
from trainwright.engine.queued import QueuedSteps, own_loss
from trainwright.models import Backbone
from trainwright.models.exporting import save_weights

__all__ = ["OwnLoopEngine"]


class OwnLoopEngine(Engine):
    """What `initialize` returns. Attributes of the model that the engine does not have are reached through it.

    Leave it with `destroy()`, or use it as a context: afterwards the model's hooks and the groups of ranks are gone.

    Attributes:
        batch: rows of a step, of a micro-batch, and micro-batches of a step.
        loaded: the configuration with its notes.
        lr_scheduler: the client's, stepped after every step that was taken; None where `optim.schedule` rules.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *arguments: Any,
        scheduler: Any = None,
        batch: BatchSizes,
        loaded: LoadedEngineConfig,
        owns_ranks: bool = False,
        **named: Any,
    ) -> None:
        super().__init__(model, *arguments, **named)
        self.batch = batch
        self.loaded = loaded
        self.lr_scheduler = scheduler
        self._owns_ranks = owns_ranks
        self._checkpointers: dict[Path, Checkpointer] = {}
        pipeline = self.data_parallel.mesh.pipeline
        self._queue = QueuedSteps(self._device, pipeline.group) if pipeline.size > 1 else None

    # --- the loop ---

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.__call__`. Over a pipeline: takes a micro-batch by name, whose loss is known when its step is, or
        at once after `eval`. There every rank of the pipeline passes the same.

        Raises:
            ConfigError: the model is one of ours and divided so that nobody holds a whole forward pass.
        """
        if self._queue is None and self._cut is None:
            return super().__call__(*inputs, **named)
        if self._queue is None or isinstance(self.model, Backbone):
            raise ConfigError(
                "this layout divides a forward pass over ranks, so that no rank has all logits to return",
                hint="use engine.forward_backward(task.loss, batch, micro_rows=...), with trainwright.tasks.CausalLM()",
            )
        if inputs:
            raise ConfigError("a pipeline takes micro-batches by name: engine(input_ids=..., labels=...)")
        if self.model.training:
            return self._queue.add(named)
        with torch.no_grad():
            return self._queue.told(self._schedule.evaluate(own_loss, [named])[0])

    def backward(self, output: LossSum | Tensor) -> Tensor:
        """See `Engine.backward`; the returned loss is divided by the accumulation, as DeepSpeed's is."""
        if self._queue is not None and self._queue.holds(output):
            return self._backward_queued(self._queue, output)
        loss = super().backward(output)
        return loss / self.accumulation if isinstance(output, Tensor) else loss

    def _backward_queued(self, queue: QueuedSteps, loss: Any) -> Tensor:
        if self._open:
            self.micro_steps += 1
        self._open = True
        if self.at_boundary:
            if self.scaler is not None:
                self.loss_factor(torch.ones(()))  # these losses are means: the count of a micro-batch is 1
            loss_sum, count = self._schedule.run(own_loss, queue.take())
            if self._counts_loss:
                self._loss_sum += loss_sum
                self._count += count
            queue.fill(loss_sum)
        return loss / self.accumulation

    def step(self, guard: Guard | None = None) -> StepReport | None:
        """See `Engine.step`; steps the client's scheduler too, unless the step overflowed."""
        report = super().step(guard)
        if report is not None and not report.overflow and self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return report

    def train(self, mode: bool = True) -> OwnLoopEngine:
        """Training mode of the model."""
        self.model.train(mode)
        return self

    def eval(self) -> OwnLoopEngine:
        """Evaluation mode of the model."""
        return self.train(False)

    # --- DeepSpeed's names ---

    @property
    def module(self) -> Any:
        """The model."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.ranks.device

    @property
    def config(self) -> Any:
        """The checked configuration."""
        return self.loaded.config

    @property
    def global_rank(self) -> int:
        return self.ranks.rank

    @property
    def local_rank(self) -> int:
        return self.ranks.local_rank

    @property
    def world_size(self) -> int:
        return self.ranks.world

    @property
    def global_steps(self) -> int:
        """Optimizer steps, skipped ones included."""
        return self.steps

    @property
    def global_samples(self) -> int:
        """Rows of all steps."""
        return self.steps * self.batch.global_

    def train_batch_size(self) -> int:
        return self.batch.global_

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.set_boundary(is_boundary)

    def was_step_applied(self) -> bool:
        """Whether the last boundary changed the parameters."""
        return self.last_report is not None and not self.last_report.skipped

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None before the first step."""
        return None if self.last_report is None else float(self.last_report.grad_norm)

    def get_lr(self) -> list[float]:
        """The learning rate of every parameter group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def gradient_clipping(self) -> float:
        """The largest gradient norm; 0 for no clipping."""
        return self.clip_norm or 0.0

    def zero_optimization_stage(self) -> int:
        return self.data_parallel.layout.zero

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by in fp16; 1 otherwise."""
        return self.scaler.scale if self.scaler is not None else 1.0

    # --- checkpoints ---

    def save_checkpoint(
        self, folder: str | Path, *, client_state: Mapping[str, Any] | None = None, keep: int | None = None
    ) -> Path:
        """Write `folder/step-N`, N being the optimizer steps taken; returns when it is on the disk. All ranks call it.

        Args:
            client_state: JSON values of yours that come back from `load_checkpoint`.
            keep: how many of the newest checkpoints stay; None keeps all.

        Raises:
            CheckpointError: it could not be written on some rank; names the rank. Earlier ones are untouched.
        """
        checkpointer = self._checkpointer(folder)
        checkpointer.keep = keep
        meta = {"client_state": dict(client_state or {})}
        checkpointer.save(self.steps, self.state_dict(), meta, required=True)
        return checkpointer.folder / f"step-{self.steps}"

    def load_checkpoint(self, folder: str | Path, step: int | None = None) -> tuple[Path | None, dict[str, Any]]:
        """Go on from a checkpoint of any layout; (None, {}) where there is none yet. All ranks call it.

        Args:
            step: which; None takes the newest that is whole on all ranks.

        Returns: its folder, and the `client_state` that was saved with it.

        Raises:
            CheckpointError: it is damaged, or its tensors are not this model's and optimizer's.
        """
        checkpointer = self._checkpointer(folder)
        if isinstance(self.optimizer, ClientOptimizer):
            self.optimizer.materialise_state()
        like = self.state_dict()
        if step is None:
            found = checkpointer.load_latest(like=like)
            if found is None:
                return None, {}
            path, state, meta = found.path, found.state, found.meta
        else:
            path = checkpointer.folder / f"step-{step}"
            if not path.exists():
                raise CheckpointError(f"{path} does not exist", hint=f"there are {_steps_in(checkpointer)}")
            state, meta = checkpointer.load(path, like=like)
        self.load_state_dict(state)
        return path, dict(meta.get("client_state", {}))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.lr_scheduler is not None:
            state["lr_scheduler"] = dict(self.lr_scheduler.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the model as a Hugging Face folder, a few rows at a time. All ranks call it; rank 0 writes.

        Raises:
            CheckpointError: the model is neither one of Trainwright's families nor a transformers model.
        """
        if not isinstance(self.model, Backbone):
            raise CheckpointError(
                f"{type(self.model).__name__} has no Hugging Face form that is known here",
                hint="save_checkpoint keeps any module; native families can be exported",
            )
        with readable_weights(self) as source:
            if source is not None:
                save_weights(self.model.config, source, folder, dtype=dtype)
        self.ranks.barrier()
        return Path(folder)

    def _checkpointer(self, folder: str | Path) -> Checkpointer:
        path = Path(folder)
        if path not in self._checkpointers:
            self._checkpointers[path] = Checkpointer(path, keep=None, asynchronous=False, ranks=self.ranks)
        return self._checkpointers[path]

    # --- the end ---

    def destroy(self) -> None:
        """Remove hooks, groups and references; the engine cannot be used afterwards, the model can (not divided ones).

        Other engines of this process are not touched.
        """
        if self.stepping is not None:
            self.stepping.close()
        if self.placed is not None:
            self.placed.close(keep=False)
        for checkpointer in self._checkpointers.values():
            checkpointer.close()
        self._checkpointers.clear()
        self.data_parallel.close()
        self.zero_grad()
        self.optimizer = self.lr_scheduler = self.ema = None
        self._parameters = self._counted = []
        if self._owns_ranks:
            stop()

    def __enter__(self) -> OwnLoopEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def __getattr__(self, name: str) -> Any:
        # Only for names that the engine does not have; `model` itself is missing while __init__ has not set it.
        if name.startswith("_") or "model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.__dict__["model"], name)


def _steps_in(checkpointer: Checkpointer) -> str:
    steps = [str(info.step) for info in checkpointer.checkpoints()]
    return f"the steps {', '.join(steps)}" if steps else "no checkpoints in that folder"
