"""`forward_backward` as a pipeline: the schedule of an engine whose model is cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Mesh
from trainwright.engine.engine import Batch, Engine, Loss
from trainwright.models import Backbone
from trainwright.parallel.pipeline import PipelineRunner

__all__ = ["Pipelined"]


class Pipelined:
    """The micro-batches of a step go through the pipeline, `together` at a time; see `engine.ForwardBackward`.

    Args:
        together: micro-batches of one run of the schedule; None takes all of a step.
    """

    def __init__(self, engine: Engine, mesh: Mesh, *, together: int | None = None, traced: bool = False) -> None:
        self._engine = engine
        self._together = together
        self.runner = PipelineRunner(
            engine.model,
            mesh.pipeline,
            device=mesh.ranks.device,
            autocast=engine.autocast,
            layout=mesh.layout,
            sequence_parts=mesh.tensor.size if isinstance(engine.model, Backbone) else 1,
            residual=engine.precision.parameter_dtype,
            prepare=engine.prepare,
            traced=traced,
        )

    def run(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        engine, parallel = self._engine, self._engine.data_parallel
        tokens = torch.tensor(micro_batches[0]["input_ids"].numel())
        scale = 1.0 if engine.scaler is None else engine.loss_factor(tokens)
        sums = [
            self.runner.forward_backward(
                loss,
                run,
                begin_backward=parallel.begin_backward,
                end_backward=parallel.end_backward,
                scale=scale,
                last=last,
            )
            for run, last in self._runs(micro_batches)
        ]
        return torch.stack([loss_sum for loss_sum, _ in sums]).sum(), torch.stack([count for _, count in sums]).sum()

    def _runs(self, micro_batches: Sequence[Batch]) -> Iterator[tuple[Sequence[Batch], bool]]:
        """(micro-batches, whether they end the step) of every run of the schedule."""
        each = self._together or len(micro_batches)
        if len(micro_batches) % each:
            raise ConfigError(
                f"parallel.pipeline.micro_batches {each} does not divide the {len(micro_batches)} micro-batches of a"
                " step"
            )
        for first in range(0, len(micro_batches), each):
            yield micro_batches[first : first + each], first + each == len(micro_batches)

    def evaluate(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        return self.runner.evaluate(loss, micro_batches)
