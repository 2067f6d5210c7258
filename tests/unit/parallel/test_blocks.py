"""Blocks are found by structure, in any module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainwright.parallel import find_blocks


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in find_blocks(model)]


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(depth))


def test_outermost_stacks_of_equal_modules() -> None:
    assert names(Tower(3)) == ["layers.0", "layers.1", "layers.2"]
    both = nn.ModuleDict({"encoder": Tower(2), "decoder": Tower(2)})
    assert names(both) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))) == []
    assert names(nn.Linear(2, 2)) == []


def test_transformers_stacks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    assert names(transformers.GPT2LMHeadModel(config)) == ["transformer.h.0", "transformer.h.1"]
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 16}
    found = names(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    assert found == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_blocks_that_share_parameters_are_left_to_the_rest() -> None:
    tower = Tower(3)
    tower.layers[2].linear1.weight = tower.layers[0].linear1.weight
    assert names(tower) == ["layers.1"]


def test_lists_of_what_is_not_called_are_no_blocks() -> None:
    model = nn.Module()
    model.parts = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2)}) for _ in range(2))
    assert names(model) == []
    again = nn.Linear(2, 2)
    repeated = nn.Module()
    repeated.layers = nn.ModuleList([again, again, nn.Linear(2, 2)])
    assert names(repeated) == ["layers.0", "layers.2"]
    assert torch.is_tensor(again.weight)
