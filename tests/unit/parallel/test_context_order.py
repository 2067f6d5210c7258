"""Which rank holds which tokens, and what is refused before anything is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Axis
from trainwright.models import GPT2Config, LlamaConfig
from trainwright.ops.rotary import RotaryScaling
from trainwright.parallel.context import SequenceOrder, apply_context, choose_ulysses, context_problems, cut_batch
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

ORDERS = [SequenceOrder(n, u) for n in (1, 2, 3, 4, 6, 8) for u in (1, 2, 3, 4) if n % u == 0]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_token_is_held_once(order: SequenceOrder) -> None:
    length = 3 * order.multiple
    parts = [order.index(rank, length) for rank in range(order.degree)]
    assert {len(part) for part in parts} == {length // order.degree}
    joined = torch.cat(parts)
    assert joined[order.row_order(length)].tolist() == list(range(length))
    for place in range(order.ring):
        of_group = [r for rank in range(order.degree) if rank // order.ulysses == place for r in parts[rank].tolist()]
        assert of_group == [n for run in order.ring_positions(place, length) for n in run]


def test_zigzag_and_plain_order() -> None:
    assert SequenceOrder(2).positions(0, 8) == (range(2), range(6, 8))
    assert SequenceOrder(2).positions(1, 8) == (range(2, 4), range(4, 6))
    assert SequenceOrder(2, 2).positions(1, 8) == (range(4, 8),)
    assert SequenceOrder(4, 2).positions(1, 8) == (range(6, 8),)
    assert SequenceOrder(6, 3).multiple == 12
    assert SequenceOrder(6, 3).positions(1, 12) == (range(2, 3), range(9, 10)), "a rank of a group may hold two pieces"


def test_a_batch_is_cut_and_positions_are_given() -> None:
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids + 1, "rows": torch.tensor([4, 9])}
    part = cut_batch(batch, Axis("context", 1, 2), SequenceOrder(2))
    assert part["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26, 27]]
    assert part["labels"].equal(part["input_ids"] + 1)
    assert part["position_ids"].tolist() == [list(range(4, 12))] * 2
    assert part["rows"].tolist() == [4, 9]
    given = cut_batch({**batch, "position_ids": ids % 16 // 2}, Axis("context", 0, 2), SequenceOrder(2, 2))
    assert given["position_ids"].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert cut_batch(batch, Axis.alone("context"), SequenceOrder(1))["input_ids"] is ids


def test_lengths_that_cannot_be_divided_name_the_nearest() -> None:
    batch = {"input_ids": torch.zeros(1, 100, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="rows of 100 tokens cannot be divided") as caught:
        cut_batch(batch, Axis("context", 0, 4), SequenceOrder(4))
    assert caught.value.hint == "use 96 or 104 tokens (data.sequence_length)"
    assert SequenceOrder(4, 4).problem(100) is None
    assert str(SequenceOrder(4).problem(3)).endswith("use 8")
    batch = {"input_ids": torch.zeros(1, 96), "key_mask": torch.ones(1, 96, dtype=torch.bool)}
    with pytest.raises(ConfigError, match="key mask"):
        cut_batch(batch, Axis("context", 0, 4), SequenceOrder(4))


def test_how_many_ranks_exchange_heads() -> None:
    assert choose_ulysses(8, 32, 8) == 8
    assert choose_ulysses(16, 32, 8) == 8
    assert choose_ulysses(4, 4, 1) == 1, "one key-value head is better sent around"
    assert choose_ulysses(6, 12, 12) == 6
    assert choose_ulysses(4, 9, 3) == 1


def test_all_reasons_at_once() -> None:
    config = LlamaConfig(**tiny_llama_config())
    assert context_problems(config, 64, 4) == []
    assert context_problems(config, 63, 1, 7) == []
    assert context_problems(config, 64, 4, 3) == ["parallel.ulysses 3 does not divide parallel.context 4"]
    stretched = dataclasses.replace(config, rope_scaling=RotaryScaling("dynamic", 2.0, 64))
    problems = context_problems(stretched, 100, 8, 8)
    assert len(problems) == 3
    for expected in ("8 does not divide the 4 attention heads", "use 96 or 104", "dynamic rotary scaling"):
        assert any(expected in problem for problem in problems), expected
    assert "2 attention heads of each of 2 tensor ranks" in context_problems(config, None, 4, 4, tensor=2)[0]
    assert context_problems(GPT2Config(**tiny_gpt2_config(attn_dropout=0.1)), 64, 4) == []


def test_what_cannot_be_applied() -> None:
    axis: Any = Axis("context", 0, 4)
    with pytest.raises(ConfigError, match="no attention that"):
        apply_context(torch.nn.Linear(2, 2), axis)
    with pytest.raises(ConfigError, match="does not divide"):
        SequenceOrder(4, 3)
    assert apply_context(torch.nn.Linear(2, 2), Axis.alone("context")) == SequenceOrder(1)
