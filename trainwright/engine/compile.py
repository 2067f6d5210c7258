"""Per-block compilation: every transformer block is one graph, compiled once and shared by all blocks of its shape."""

from __future__ import annotations

from trainwright.models import Decoder

__all__ = ["compile_blocks"]


def compile_blocks(model: Decoder) -> int:
    """Compile each module of `model.blocks` and the final norm in place; returns how many blocks were marked.

    Blocks are compiled one by one, not the model as a whole: equal blocks hit the same compiled code, so the time to
    compile does not grow with depth, and the embedding's backward stays out of the graph (the compiler's scatter-add
    on CPU is not deterministic; PyTorch's own kernel is). Shapes are static: training uses one shape throughout.
    """
    for block in model.blocks:
        block.compile(dynamic=False)
    model.final_norm.compile(dynamic=False)
    return len(model.blocks)
