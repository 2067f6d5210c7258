"""Per-block compilation: every repeated block is one graph, compiled once and shared by all blocks of its shape."""

from __future__ import annotations

import torch
from torch import nn

from trainwright.models import Backbone
from trainwright.parallel import blocks_of

__all__ = ["compile_blocks"]


def compile_blocks(model: nn.Module) -> int:
    """Compile the forward pass of each repeated block, and a native model's final norm, in place; returns how many
    blocks.

    Blocks are compiled one by one, not the model as a whole: equal blocks hit the same compiled code, so the time to
    compile does not grow with depth, and the embedding's backward stays out of the graph (the compiler's scatter-add
    on CPU is not deterministic; PyTorch's own kernel is). Only `forward` is compiled, not the call with its hooks:
    those of `fully_shard` gather parameters around it. Shapes are static: training uses one shape throughout.
    """
    blocks = [block for _, block in blocks_of(model)]
    for block in blocks:
        if "compile" in block.__dict__:  # a recomputed block compiles what it computes again, not the recomputing
            block.compile(dynamic=False)
        else:
            _compile_forward(block)
    norm = model.final_norm if isinstance(model, Backbone) else None  # None too where another stage has it
    if norm is not None and any(True for _ in norm.parameters()):  # blocks that end with one need none
        _compile_forward(norm)
    return len(blocks)


def _compile_forward(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, dynamic=False)
