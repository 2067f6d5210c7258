"""One small training run of a model with the head of a task, under any layout: what parity tests of heads compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.config.precision_section import FP32Precision
from trainwright.engine import Engine, precision
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import BertConfig, GPT2Config, HeadSpec, LlamaConfig, attach_head, build_model
from trainwright.models.initialise import initial_values
from trainwright.models.weights import kept_tensors
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.tasks.task import LossOutput
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

__all__ = ["MODELS", "batch_of", "loss", "train"]

ROWS, TOKENS, MICRO, VOCABULARY = 8, 16, 4, 96


def _bert(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    return BertConfig(**{**sizes, "max_position_embeddings": 32, **changes})


def _llama() -> LlamaConfig:
    return LlamaConfig(**tiny_llama_config(vocab_size=VOCABULARY))


def _gpt2() -> GPT2Config:
    return GPT2Config(**tiny_gpt2_config(vocab_size=VOCABULARY, embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1))


LABELS = ("a", "b", "c")
# Every head, on decoders and encoders; all with dropout, which must not depend on the layout.
MODELS: dict[str, tuple[Any, HeadSpec | None]] = {
    "bert-lm": (_bert, None),
    "roberta-lm-untied": (
        lambda: _bert(architecture="roberta", pad_token_id=1, type_vocab_size=1, tie_embeddings=False),
        None,
    ),
    "bert-sequence": (_bert, HeadSpec("sequence", LABELS)),
    "bert-token-crf": (_bert, HeadSpec("token", LABELS, crf=True)),
    "bert-embedding-mean": (_bert, HeadSpec("embedding", pooling="mean")),
    "llama-sequence": (_llama, HeadSpec("sequence", LABELS)),
    "llama-entities": (_llama, HeadSpec("entities", LABELS)),
    "gpt2-span": (_gpt2, HeadSpec("span")),
    "gpt2-token": (_gpt2, HeadSpec("token", LABELS)),
}


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    """A global batch, the same everywhere: texts of different lengths, and labels of what the head scores."""
    generator = torch.Generator().manual_seed(7 + step)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    ids, lengths = draw(VOCABULARY, ROWS, TOKENS), 4 + draw(TOKENS - 3, ROWS)
    mask = torch.arange(TOKENS)[None] < lengths[:, None]
    batch = {"input_ids": ids, "lengths": lengths, "key_mask": mask}
    if name.startswith("bert"):
        batch["token_type_ids"] = (torch.arange(TOKENS)[None] > lengths[:, None] // 2).long()
    _, spec = MODELS[name]
    kind = "lm" if spec is None else spec.kind
    if kind == "lm":
        hidden = mask & (torch.rand(mask.shape, generator=generator) < 0.2)
        batch["labels"] = torch.where(hidden, ids, -100)
    elif kind == "token":
        batch["labels"] = torch.where(mask, draw(3, ROWS, TOKENS), -100)
        batch["labels"][:, 1::3] = -100
    elif kind == "span":
        batch["labels"] = torch.stack((lengths // 3, lengths - 1), 1)
    else:
        batch["labels"] = draw(3, ROWS)
    if kind == "entities":
        batch["entity_starts"] = torch.stack((lengths // 3, lengths - 1), 1)
    return batch


def loss(model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
    """What a task of that head would train, as sums."""
    labels = batch["labels"]
    if model.config.head is None:
        sums = model.head_loss(model.hidden_states_of(batch).flatten(0, 1), labels.flatten())
        return LossOutput(sums.loss_sum, sums.count)
    scores = model.scores(batch)
    kind = model.config.head.kind
    if kind == "embedding":
        target = F.one_hot(labels, scores.shape[1]).to(scores.dtype)
        return LossOutput((scores * target).sum(), torch.tensor(len(labels)))
    if kind == "token" and model.config.head.crf:
        return LossOutput(*model.task_head.crf.loss_sum(scores, labels))
    if kind == "span":
        scores = scores.masked_fill(~batch["key_mask"][..., None], -1e9)
        return LossOutput(F.cross_entropy(scores, labels, reduction="sum"), torch.tensor(labels.numel()))
    total = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="sum")
    return LossOutput(total, (labels != -100).sum())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(
    name: str, layout: Layout, ranks: Ranks = ALONE, *, memory: dict[str, Any] | None = None, compiled: bool = False
) -> dict[str, Any]:
    """Three steps; losses, norms, an evaluation, gradients of the first step and last parameters by name."""
    make_config, spec = MODELS[name]
    mesh = make_mesh(layout, ranks)
    policy = precision("fp32")
    sections = Sections(FP32Precision(name="fp32"), ParallelSection(), CommSection(), MemorySection(**(memory or {})))
    model = build_model(make_config(), device="meta")
    if spec is not None:
        attach_head(model, spec)
    divided = divide(model, mesh, policy, sections, compiled=compiled)
    materialise(model, ranks.device, initial_values(model.config, 3))
    optimizer = build_optimizer(optimized_parameters(model), OptimizerOptions(name="adamw", lr=3e-3, eps=1e-3))
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
    losses, norms, gradients = [], [], {}
    for step in range(3):
        own = {key: value.chunk(places)[place] for key, value in batch_of(name, step).items()}
        engine.forward_backward(loss, own, micro_rows=ROWS // places // micro_batches, seed=step)
        if step == 0:
            gradients = {key: whole(p.grad).clone() for key, p in model.named_parameters() if p.grad is not None}
        report = engine.step()
        assert report is not None
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
    model.eval()
    own = {key: value.chunk(places)[place] for key, value in batch_of(name, 9).items()}
    told = engine.evaluate(loss, own)
    sums = torch.tensor(ranks.all_gather_json([float(told[0]), float(told[1])])).sum(0).tolist()
    parameters = {key: whole(value).detach().clone() for key, value in kept_tensors(model).items()}
    return {
        "losses": [*losses, sums[0] / sums[1]],
        "norms": norms,
        "gradients": gradients,
        "parameters": parameters,
    }
