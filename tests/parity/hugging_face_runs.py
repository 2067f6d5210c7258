"""Tiny models of many architectures of transformers, and one small training run of them under any layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.config.precision_section import FP32Precision
from trainwright.engine import Engine, precision
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import build_model
from trainwright.models.fields import config_from_fields
from trainwright.models.initialise import initial_values
from trainwright.models.weights import kept_tensors
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.tasks.task import LossOutput

__all__ = ["TINY", "batch_of", "tiny_config", "train"]

ROWS, TOKENS, MICRO, VOCABULARY = 8, 12, 4, 96

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

TINY: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 6},
    "gemma": _DECODER,
    "phi": {**_DECODER, "num_key_value_heads": 4},
    "gpt2": _GPT2,
    "gpt_neox": _DECODER,
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "deberta-v2": _DEBERTA,
    "t5": _T5,
    "bart": _BART,
    # Beyond the twelve: what their heads, masks and positions have of their own.
    "gemma2": {**_DECODER, "sliding_window": 8, "final_logit_softcapping": 1.0},
    "cohere": _DECODER,
    "granite": {**_DECODER, "logits_scaling": 3.0},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
    "deberta": _DEBERTA,
    "albert": {**_ENCODER, "embedding_size": 16},
    "modernbert": {**_DECODER, "global_attn_every_n_layers": 2, "local_attention": 8},
    "marian": {**_BART, "decoder_start_token_id": 0},
}


def tiny_config(name: str, **changes: Any) -> Any:
    """A transformers configuration of one of the architectures above."""
    return config_from_fields({"family": "transformers", "model_type": name, **TINY[name], **changes})


def batch_of(config: Any, step: int, *, packed: bool = False) -> dict[str, Tensor]:
    """A global batch, the same everywhere: padded rows with the labels of what the model is for, or packed rows."""
    generator = torch.Generator().manual_seed(7 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    ids, lengths = draw(ROWS, TOKENS), torch.randint(5, TOKENS + 1, (ROWS,), generator=generator)
    mask = torch.arange(TOKENS)[None] < lengths[:, None]
    batch = {"input_ids": torch.where(mask, ids, 0), "key_mask": mask, "lengths": lengths}
    if config.kind == "masked_lm":
        batch["labels"] = torch.where(mask & (torch.rand(mask.shape, generator=generator) < 0.3), ids, -100)
    elif config.kind == "seq2seq":
        batch["labels"] = torch.where(torch.arange(6)[None] < lengths[:, None] - 3, draw(ROWS, 6), -100)
    else:
        batch["labels"] = torch.where(mask, draw(ROWS, TOKENS), -100)
    if packed:
        second = torch.arange(TOKENS)[None] >= lengths[:, None] // 2
        positions = torch.arange(TOKENS)[None] - torch.where(second, lengths[:, None] // 2, 0)
        batch = {"input_ids": ids, "labels": draw(ROWS, TOKENS), "position_ids": positions}
        batch["document_ids"] = second.int()
    return batch


def loss(model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
    """What a task of that kind of model trains, as sums."""
    if model.config.kind == "seq2seq":
        hidden = model.hidden_states(
            batch["input_ids"], key_mask=batch["key_mask"], decoder_input_ids=model.shift_right(batch["labels"])
        )
    else:
        hidden = model.hidden_states_of(batch)
    sums = model.head_loss(hidden.flatten(0, 1), batch["labels"].flatten())
    return LossOutput(sums.loss_sum, sums.count)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(
    name: str,
    layout: Layout,
    ranks: Ranks = ALONE,
    *,
    memory: dict[str, Any] | None = None,
    packed: bool = False,
    changes: Mapping[str, Any] | None = None,
    steps: int = 3,
) -> dict[str, Any]:
    """A few steps; losses, gradient norms, an evaluation and the last parameters by name, as plain lists."""
    config = tiny_config(name, **(changes or {}))
    torch.manual_seed(0)
    model = build_model(config, device="meta").train()
    mesh = make_mesh(layout, ranks)
    sections = Sections(FP32Precision(name="fp32"), ParallelSection(), CommSection(), MemorySection(**(memory or {})))
    divided = divide(model, mesh, precision("fp32"), sections)
    materialise(model, "cpu", initial_values(config, 3))
    optimizer = build_optimizer(optimized_parameters(model), OptimizerOptions(lr=3e-3, eps=1e-3))
    rows = ROWS // mesh.rows[1]
    engine = Engine(
        model,
        optimizer,
        multiplier=lambda step: 1.0,
        precision=precision("fp32"),
        data_parallel=divided.data_parallel,
        schedule=divided.schedule,
        accumulation=rows // (MICRO // mesh.rows[1] or 1),
        clip_norm=1.0,
    )
    report: dict[str, Any] = {"losses": [], "norms": []}
    place, places = mesh.rows
    for step in range(steps):
        batch = {key: value.chunk(places)[place] for key, value in batch_of(config, step, packed=packed).items()}
        engine.forward_backward(loss, batch, micro_rows=MICRO // places or 1)
        taken = engine.step()
        assert taken is not None
        report["losses"].append(float(taken.loss))
        report["norms"].append(float(taken.grad_norm))
    mine = {key: value.chunk(places)[place] for key, value in batch_of(config, 99, packed=packed).items()}
    sums = torch.tensor(engine.evaluate(loss, mine), dtype=torch.float64)
    report["evaluation"] = ranks.sum_(sums).tolist()
    divided.data_parallel.drop_gathered()
    report["parameters"] = {name: whole(value).flatten().tolist() for name, value in kept_tensors(model).items()}
    return report
