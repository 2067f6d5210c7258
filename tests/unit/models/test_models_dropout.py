"""A model's dropout under micro-batches, cuts of sequence, heads and layers, recomputing and compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.memory import apply_recompute
from trainwright.models import build_model
from trainwright.models.decoder import Decoder
from trainwright.models.dropout import AttentionDropout, Dropout, DropoutPlace, join_place
from trainwright.models.gpt2 import GPT2Config
from trainwright.models.llama import LlamaConfig
from trainwright.tasks import CausalLM
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH = 6, 24


def model(family: str = "gpt2", **changes: Any) -> Decoder:
    if family == "gpt2":
        sizes = tiny_gpt2_config(attn_dropout=0.2, resid_dropout=0.2, embd_dropout=0.2, initializer_range=0.2)
        return build_model(GPT2Config(**{**sizes, **changes}), seed=1)
    sizes = tiny_llama_config(attention_dropout=0.2, initializer_range=0.2)
    return build_model(LlamaConfig(**{**sizes, **changes}), seed=1)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=generator)
    place = torch.arange(LENGTH).repeat(ROWS, 1)
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": place % 11,  # packed: positions start anew in each document
        "document_ids": (place // 11).int(),
    }


def loss_and_gradients(decoder: Decoder, groups: list[slice], seed: int = 7) -> tuple[float, list[Tensor]]:
    decoder.zero_grad()
    total = 0.0
    for rows in groups:
        decoder.set_dropout(seed=seed, rows=torch.arange(ROWS)[rows])
        out = CausalLM().loss(decoder, {name: value[rows] for name, value in batch().items()})
        out.loss_sum.backward()
        total += float(out.loss_sum.detach())
    gradients = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    return total, gradients


WHOLE = [slice(0, ROWS)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_micro_batches_drop_what_the_whole_batch_drops(family: str) -> None:
    decoder = model(family)
    expected, gradients = loss_and_gradients(decoder, WHOLE)
    for groups in ([slice(0, 2), slice(2, 4), slice(4, 6)], [slice(i, i + 1) for i in range(ROWS)]):
        found, theirs = loss_and_gradients(decoder, groups)
        assert found == pytest.approx(expected, rel=1e-6)
        for a, b in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    other, _ = loss_and_gradients(decoder, WHOLE, seed=8)
    assert abs(other / expected - 1) > 1e-4, "another step drops something else"
    decoder.eval()
    quiet, _ = loss_and_gradients(decoder, WHOLE)
    assert abs(quiet / expected - 1) > 1e-4, "dropout was on"


def test_without_a_place_torch_draws() -> None:
    decoder = model()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    torch.manual_seed(0)
    first, second = decoder(**inputs), decoder(**inputs)
    torch.manual_seed(0)
    assert torch.equal(decoder(**inputs), first)
    assert not torch.equal(first, second)
    decoder.set_dropout(seed=1, rows=torch.arange(ROWS))
    placed = decoder(**inputs)
    decoder.set_dropout(seed=1, rows=torch.arange(ROWS))
    assert torch.equal(decoder(**inputs), placed)
    decoder.set_dropout(seed=None, rows=None)
    torch.manual_seed(0)
    assert torch.equal(decoder(**inputs), first)


def test_rows_and_seed_come_together_and_positions_before_use() -> None:
    decoder = model()
    with pytest.raises(ValueError, match="together"):
        decoder.set_dropout(seed=None, rows=torch.arange(2))
    decoder.set_dropout(seed=1, rows=torch.arange(2))
    with pytest.raises(RuntimeError, match="locate"):
        decoder.embed(torch.zeros(2, 4, dtype=torch.long), torch.arange(4))
    plain = model(attn_dropout=0.0, resid_dropout=0.0, embd_dropout=0.0)
    plain.set_dropout(seed=1, rows=torch.arange(2))
    assert not plain.dropout_place.awaits_tokens, "nothing drops: nothing to do in each step"


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_after_other_forward_passes_began(policy: str) -> None:
    """As in a pipeline: all micro-batches go forward before the first goes backward."""
    _, expected = loss_and_gradients(model(), [slice(0, 3), slice(3, 6)])
    decoder = apply_recompute(model(), policy)
    assert isinstance(decoder, Decoder)
    losses = []
    for rows in (slice(0, 3), slice(3, 6)):
        decoder.set_dropout(seed=7, rows=torch.arange(ROWS)[rows])
        losses.append(CausalLM().loss(decoder, {name: value[rows] for name, value in batch().items()}).loss_sum)
    decoder.set_dropout(seed=99, rows=torch.arange(1))
    for loss in losses:
        loss.backward()
    for p, other in zip(decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_a_part_of_the_layers_drops_what_the_whole_model_drops() -> None:
    """Blocks 2 and 3 of 4 on their own, held by number as a pipeline's part holds them."""
    decoder = model(num_layers=4)
    data = batch()
    ids, positions, documents = data["input_ids"], data["position_ids"], data["document_ids"]
    decoder.set_dropout(seed=7, rows=torch.arange(ROWS))
    expected = decoder.hidden_states(ids, position_ids=positions, document_ids=documents)
    decoder.set_dropout(seed=7, rows=torch.arange(ROWS))
    decoder.dropout_place.locate(positions, documents)
    blocks = dict(decoder.blocks.named_children())
    x = decoder.embed(ids, positions)
    for names in (("0", "1"), ("2", "3")):
        part = model(num_layers=4)
        part.load_state_dict(decoder.state_dict())
        part.transformer.h = nn.ModuleDict({name: blocks[name] for name in names})  # type: ignore[union-attr]
        part.set_dropout(seed=7, rows=torch.arange(ROWS))
        part.dropout_place.locate(positions, documents)
        x = part.run_blocks(x, positions, documents)
    assert torch.equal(decoder.final_norm(x), expected)


def test_slices_of_the_sequence_and_of_the_heads() -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"a": Dropout(0.3), "b": AttentionDropout(0.3)})
    place = DropoutPlace()
    assert join_place(whole, place, "cpu") == 2
    place.set(5, torch.arange(3))
    place.locate(torch.arange(16), None)
    x = torch.randn(3, 16, 8)
    expected = whole["a"](x)
    for rank in range(4):
        place.slice_rank = rank
        part = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(whole["a"](x[:, part]), expected[:, part])
    drops = whole["b"]
    assert isinstance(drops, AttentionDropout)
    kept = drops.kept()
    assert kept is not None
    heads = kept.mask(6)
    drops.first_head = 4
    shifted = drops.kept()
    assert shifted is not None
    assert torch.equal(shifted.mask(2), heads[:, 4:])
    # A part of the sequence with its own positions, as context parallelism has it.
    place.set(5, torch.arange(3))
    place.locate(torch.arange(8, 16), None)
    assert torch.equal(whole["a"](x[:, 8:]), expected[:, 8:])


def test_compiled_blocks_share_one_program_over_layers_and_steps() -> None:
    from torch._dynamo.utils import counters

    decoder, plain = model(num_layers=4), model(num_layers=4)
    torch._dynamo.reset()
    counters.clear()
    for block in decoder.blocks.children():
        block.forward = torch.compile(block.forward, dynamic=False)
    for step in range(3):
        found, gradients = loss_and_gradients(decoder, WHOLE, seed=step)
        expected, theirs = loss_and_gradients(plain, WHOLE, seed=step)
        assert found == pytest.approx(expected, rel=1e-5)
        for a, b in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1
