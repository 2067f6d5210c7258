"""One small training run under any layout, and the same on one process: what the parity tests of layouts compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.config.precision_section import BF16Precision, FP32Precision
from trainwright.engine import Engine, precision
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.models.initialise import initial_values
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.tasks import CausalLM
from trainwright.testing import tiny_gpt2_config, tiny_llama_config, tiny_moe_config

__all__ = ["FAMILIES", "Run", "Setting", "batches", "differences", "train"]

ROWS, TOKENS, MICRO = 8, 32, 4
"""Rows of a step, tokens of a row, micro-batches of a step on one process."""


def _moe() -> Any:
    from trainwright.models import MoEConfig

    return MoEConfig(**tiny_moe_config(vocab_size=96, num_layers=4))


PRECISIONS: dict[str, Any] = {"fp32": FP32Precision, "bf16": BF16Precision}

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**tiny_llama_config(vocab_size=96, num_layers=4)),
    "gpt2": lambda: GPT2Config(
        **tiny_gpt2_config(vocab_size=96, num_layers=4, resid_dropout=0.0, attn_dropout=0.0, embd_dropout=0.0)
    ),
    "moe": _moe,
}


@dataclass(frozen=True)
class Setting:
    """What of a run may vary beside its layout."""

    family: str
    steps: int = 3
    precision: str = "fp32"
    memory: dict[str, Any] | None = None
    compiled: bool = False
    documents: bool = False
    optimizer: str = "adamw"


@dataclass
class Run:
    """What a run leaves: losses and norms of its steps, gradients of the first step, and the engine."""

    engine: Engine
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def batches(vocabulary: int, steps: int, *, documents: bool) -> list[dict[str, Tensor]]:
    """Global batches, the same everywhere; some labels are not trained."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(steps):
        ids = torch.randint(vocabulary, (ROWS, TOKENS + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": labels}
        if documents:
            numbers = (torch.rand((ROWS, TOKENS), generator=generator) < 0.1).cumsum(1)
            batch["document_ids"] = numbers
            starts = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
            index = torch.arange(TOKENS).expand(ROWS, -1)
            batch["position_ids"] = index - torch.where(starts, index, 0).cummax(1).values
        made.append(batch)
    return made


def train(setting: Setting, layout: Layout, ranks: Ranks = ALONE) -> Run:
    """Build, divide and train; every rank of `ranks` calls it."""
    config = FAMILIES[setting.family]()
    mesh = make_mesh(layout, ranks)
    policy = precision(setting.precision)
    memory = MemorySection(**(setting.memory or {}))
    sections = Sections(PRECISIONS[setting.precision](name=setting.precision), ParallelSection(), CommSection(), memory)
    model = build_model(config, device="meta")
    divided = divide(model, mesh, policy, sections, compiled=setting.compiled)
    materialise(model, ranks.device, initial_values(config, 3))
    optimizer = build_optimizer(
        optimized_parameters(model), OptimizerOptions(name=setting.optimizer, lr=3e-3, eps=1e-3)
    )
    place, places = mesh.rows
    micro_batches = min(MICRO, ROWS // places)
    engine = Engine(
        model,
        optimizer,
        multiplier=lambda step: 1.0,
        precision=policy,
        data_parallel=divided.data_parallel,
        accumulation=micro_batches,
        clip_norm=0.5,
        schedule=divided.schedule,
        cut=divided.cut,
    )
    task = CausalLM()
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches(config.vocab_size, setting.steps, documents=setting.documents)):
        own = {key: value.chunk(places)[place] for key, value in batch.items()}
        engine.forward_backward(task.loss, own, micro_rows=ROWS // places // micro_batches, seed=step)
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        report = engine.step()
        assert report is not None
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
    return Run(engine, losses, norms, gradients)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts are; a collective of the ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def differences(run: Run, reference: Run) -> dict[str, float]:
    """Largest relative differences of losses, norms, first gradients and last parameters to those of one process.

    Tensors are compared by norm: |a - b| / |b|; those of a part of the model by their names.
    """
    expected = dict(reference.engine.model.named_parameters())

    def apart(name: str, ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))

    gradients = {
        name: apart(name, gradient, reference.gradients[_known(name, expected)])
        for name, gradient in run.gradients.items()
    }
    parameters = {
        name: apart(name, whole(p).detach(), expected[_known(name, expected)].detach())
        for name, p in run.engine.model.named_parameters()
    }
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(run.losses, reference.losses, strict=True)),
        "norm": max(abs(a / b - 1) for a, b in zip(run.norms, reference.norms, strict=True)),
        "gradient": max(gradients.values(), default=0.0),
        "parameter": max(parameters.values(), default=0.0),
    }


def _known(name: str, expected: dict[str, Any]) -> str:
    """Tied parameters have one name on one process, and the other on a pipeline part that holds the head alone."""
    if name in expected:
        return name
    return next(known for known in expected if "embed_tokens" in known or "wte" in known)
