"""Weights of Andrej Karpathy's llama2.c (`stories15M.bin` and its siblings): the version 0 binary file.

Header of seven little-endian int32: dim, hidden_dim, layers, heads, kv_heads, vocab (negative: the head is not tied),
seq_len; then float32 matrices, all layers of one kind together. Rotary pairs are interleaved.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from trainwright.base.errors import ModelError
from trainwright.models.llama.config import LlamaConfig
from trainwright.models.llama.model import LlamaForCausalLM

__all__ = ["load_llama2c"]

_HEADER = struct.Struct("<7i")


def load_llama2c(path: str | Path) -> LlamaForCausalLM:
    """The model in a llama2.c version 0 `.bin` file, fp32, in evaluation mode, with interleaved rotary layout.

    Raises:
        ModelError: the file is missing, is not of this format, or its size is not what its header says.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    config = _read_header(path, raw)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    values = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size)
    position = 0

    def take(count: int) -> torch.Tensor:
        nonlocal position
        position += count
        if position > values.size:
            raise ModelError(f"{path} ends early: {values.size} numbers, at least {position} expected by its header")
        return torch.from_numpy(values[position - count : position].copy())

    with torch.no_grad():
        for parameter in _file_order(model):
            parameter.copy_(take(parameter.numel()).view(parameter.shape))
        if not config.tie_embeddings:
            take(config.max_position_embeddings * config.head_dim)  # the rotary tables stand before the head
            model.lm_head.weight.copy_(take(model.lm_head.weight.numel()).view(model.lm_head.weight.shape))
    return model.eval()


def _read_header(path: Path, raw: bytes) -> LlamaConfig:
    if len(raw) < _HEADER.size:
        raise ModelError(f"{path} has {len(raw)} bytes; a llama2.c file begins with a header of {_HEADER.size}")
    dim, hidden, layers, heads, kv_heads, vocab, length = _HEADER.unpack_from(raw)
    plausible = min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) > 0 and max(dim, hidden) < 1 << 20
    if not plausible or layers > 4096 or dim % heads:
        raise ModelError(
            f"{path} is not a llama2.c version 0 file: header {(dim, hidden, layers, heads, kv_heads, vocab, length)}",
            hint="files of version 1 and later (magic 'ak42') are not supported; export with --version 0",
        )
    return LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rotary_layout="interleaved",
        tie_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_id=1,  # a llama2.c stream ends where the next story would begin
    )


def _file_order(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The parameters before the rotary tables, in the order of the file; w1, w2, w3 are gate, down, up."""
    kinds = (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp.up_proj",
    )
    layers = [block.get_parameter(f"{kind}.weight") for kind in kinds for block in model.blocks.children()]
    return [model.model.embed_tokens.weight, *layers, model.model.norm.weight]
