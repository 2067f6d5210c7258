"""One small training run with adapters under any layout: what the parity tests of adapters compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layout_runs import FAMILIES, MICRO, PRECISIONS, ROWS, Run, batches, whole
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.engine import Engine, precision
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import Values, materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import LlamaConfig, build_model
from trainwright.models.adapters import AdapterOptions, adapter_values, apply_adapter
from trainwright.models.adapters.peft_methods import apply_peft_method
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.initialise import initial_values
from trainwright.optim import OptimizerOptions, Rule, build_optimizer
from trainwright.parallel.pipeline import parameter_names
from trainwright.tasks import CausalLM
from trainwright.testing import tiny_llama_config

__all__ = ["CONFIGS", "Adapted", "differences", "train"]

TRANSFORMERS = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "wide llama": lambda: LlamaConfig(
        **tiny_llama_config(vocab_size=96, num_layers=2, hidden_size=128, intermediate_size=256, head_dim=32)
    ),
    "transformers": lambda: HuggingFaceConfig(TRANSFORMERS),
    "one key head": lambda: LlamaConfig(**tiny_llama_config(vocab_size=96, num_layers=2, num_kv_heads=1)),
}
"""Two blocks of 64 numbers and more in every row, which tensor ranks can divide; heads that they cannot divide."""


@dataclass(frozen=True)
class Adapted:
    """What of a run may vary beside its layout."""

    family: str
    options: AdapterOptions | dict[str, Any]
    steps: int = 3
    precision: str = "fp32"
    memory: dict[str, Any] | None = None


def train(setting: Adapted, layout: Layout, ranks: Ranks = ALONE, *, frozen: bool = False) -> Run:
    """Build, adapt, divide and train; every rank of `ranks` calls it. frozen: a rule freezes the adapters too."""
    config = CONFIGS[setting.family]()
    mesh = make_mesh(layout, ranks)
    policy = precision(setting.precision)
    memory = MemorySection(**(setting.memory or {}))
    sections = Sections(PRECISIONS[setting.precision](name=setting.precision), ParallelSection(), CommSection(), memory)
    if isinstance(setting.options, AdapterOptions):
        model = build_model(config, device="meta")
        report = apply_adapter(model, setting.options)
        divided = divide(model, mesh, policy, sections)
        values = adapter_values(report.linears, initial_values(config, 3), seed=4)
        materialise(model, ranks.device, _with_addition(values))
    else:
        model = build_model(config, seed=3)
        apply_peft_method(model, setting.options, seed=4)
        divided = divide(model, mesh, policy, sections)
    rules = (Rule(r"lora_", freeze=True),) if frozen else ()
    options = OptimizerOptions(lr=3e-3, eps=1e-3, rules=rules)
    optimizer = build_optimizer(optimized_parameters(model), options, elsewhere=parameter_names(model))
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
    for step, batch in enumerate(batches(config.vocab_size, setting.steps, documents=False)):
        own = {key: value.chunk(places)[place] for key, value in batch.items()}
        engine.forward_backward(task.loss, own, micro_rows=ROWS // places // micro_batches, seed=step)
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        taken = engine.step()
        assert taken is not None
        losses.append(float(taken.loss))
        norms.append(float(taken.grad_norm))
    return Run(engine, losses, norms, gradients)


def _with_addition(values: Values) -> Values:
    """B that is not zero, so that every gradient and the length of every row matters from the first step on."""

    def value(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not name.endswith("lora_B"):
            return values(name, shape, dtype)
        generator = torch.Generator().manual_seed(derive_seed(9, name))
        return torch.randn(tuple(shape), generator=generator).mul(0.02).to(dtype)

    return value


def differences(run: Run, reference: Run) -> dict[str, float]:
    """Largest relative differences of losses, norms, first gradients and trained parameters to those of one process;
    and how many frozen parameters are not the same bits.

    Tensors are compared by norm: |a - b| / |b|.
    """
    expected = dict(reference.engine.model.named_parameters())
    found = {name: whole(p).detach() for name, p in run.engine.model.named_parameters()}
    trained = {name for name, p in run.engine.model.named_parameters() if p.requires_grad}
    assert set(run.gradients) <= trained
    gradients = [_apart(gradient, reference.gradients[name]) for name, gradient in run.gradients.items()]
    parameters = [_apart(found[name], expected[name].detach()) for name in trained]
    kept = [name for name in found if name not in trained and name in expected]  # a tied one has another name there
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(run.losses, reference.losses, strict=True)),
        "norm": max(abs(a / b - 1) for a, b in zip(run.norms, reference.norms, strict=True)),
        "gradient": max(gradients, default=0.0),
        "parameter": max(parameters, default=0.0),
        "frozen": float(sum(not torch.equal(found[name], expected[name]) for name in kept)),
    }


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
