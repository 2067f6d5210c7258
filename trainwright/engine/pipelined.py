"""`forward_backward` as a pipeline: the schedule of an engine whose model is cut over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainwright.comm.mesh import Mesh
from trainwright.engine.engine import Batch, Engine, Loss
from trainwright.parallel.pipeline import PipelineRunner

__all__ = ["Pipelined"]


class Pipelined:
    """All micro-batches of a step go through the pipeline together; see `engine.ForwardBackward`."""

    def __init__(self, engine: Engine, mesh: Mesh, *, traced: bool = False) -> None:
        self._engine = engine
        self.runner = PipelineRunner(
            engine.model,
            mesh.pipeline,
            device=mesh.ranks.device,
            autocast=engine.autocast,
            layout=mesh.layout,
            sequence_parts=mesh.tensor.size,
            residual=engine.precision.parameter_dtype,
            prepare=engine.prepare,
            traced=traced,
        )

    def run(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        engine, parallel = self._engine, self._engine.data_parallel
        tokens = torch.tensor(micro_batches[0]["input_ids"].numel())
        scale = 1.0 if engine.scaler is None else engine.loss_factor(tokens)
        return self.runner.forward_backward(
            loss, micro_batches, begin_backward=parallel.begin_backward, end_backward=parallel.end_backward, scale=scale
        )

    def evaluate(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        return self.runner.evaluate(loss, micro_batches)
