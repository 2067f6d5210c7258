"""NEFTune's noise: its size, its independence of micro-batches and of the other rows, silence outside training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.models.embedding_noise import EmbeddingNoise, attach_embedding_noise, lengths_of
from trainwright.ops.dropout import token_keys, uniform
from trainwright.tasks import CausalLM
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH, ALPHA = 6, 24, 5.0


def model(family: str = "llama") -> tuple[Any, EmbeddingNoise]:
    made: Any
    if family == "llama":
        made = build_model(LlamaConfig(**tiny_llama_config()), seed=1)
    else:
        made = build_model(GPT2Config(**tiny_gpt2_config()), seed=1)
    made.train()
    return made, attach_embedding_noise(made, ALPHA)


def batch(packed: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=generator)
    place = torch.arange(LENGTH).repeat(ROWS, 1)
    found = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    if packed:
        return {**found, "position_ids": place % 11, "document_ids": (place // 11).int()}
    return {**found, "position_ids": place, "lengths": torch.tensor([24, 3, 12, 24, 1, 7])}


def noise_of(net: Any, noise: EmbeddingNoise, rows: slice, given: dict[str, Tensor], seed: int = 7) -> Tensor:
    """What is added to the embedded tokens of these rows."""
    net.set_dropout(seed=seed, rows=torch.arange(ROWS)[rows])
    ids = given["input_ids"][rows]
    net.dropout_place.locate(
        given["position_ids"][rows], given["document_ids"][rows] if "document_ids" in given else None
    )
    added: Tensor = net.embedding(ids) - torch.nn.functional.embedding(ids, net.embedding.weight)
    return added.detach()


def test_numbers_are_uniform_and_differ_by_token_and_feature() -> None:
    keys = token_keys(3, torch.arange(50), torch.arange(40))
    found = uniform(keys, torch.arange(32))
    assert found.shape == (50, 40, 32)
    assert float(found.min()) >= -1.0
    assert float(found.max()) < 1.0
    assert float(found.mean()) == pytest.approx(0.0, abs=0.005)
    assert float(found.var()) == pytest.approx(1 / 3, rel=0.01)
    low, high = found[:, :, 0].flatten(), found[:, :, 1].flatten()
    assert abs(float(torch.corrcoef(torch.stack((low, high)))[0, 1])) < 0.07
    assert float(found.flatten().unique().numel()) > 0.99 * found.numel()


@pytest.mark.parametrize("packed", [True, False])
def test_its_size_goes_by_the_real_tokens_of_each_text(packed: bool) -> None:
    net, noise = model()
    given = batch(packed)
    noise.see(given)
    added = noise_of(net, noise, slice(0, ROWS), given)
    width = added.shape[-1]
    if packed:
        lengths = torch.tensor([11] * 22 + [2] * 2).expand(ROWS, LENGTH)
    else:
        lengths = given["lengths"][:, None].expand(ROWS, LENGTH)
    bound = ALPHA / (lengths * width).float().sqrt()
    ratio = added.abs().amax(-1) / bound
    assert float(ratio.max()) <= 1.0 + 1e-5
    assert float(ratio.min()) > 0.6, "the largest of so many features is near the bound"


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_and_ranks_add_what_the_whole_batch_adds(packed: bool) -> None:
    net, noise = model()
    given = batch(packed)
    noise.see(given)
    whole = noise_of(net, noise, slice(0, ROWS), given)
    parts = [noise_of(net, noise, slice(first, first + 2), given) for first in range(0, ROWS, 2)]
    assert torch.equal(torch.cat(parts), whole)
    second = slice(ROWS // 2, ROWS)  # the rows of rank 1 of 2
    noise.see({key: value[second] for key, value in given.items()}, 1)
    assert torch.equal(noise_of(net, noise, second, given), whole[second])
    assert not torch.equal(noise_of(net, noise, second, given, seed=8), whole[second])


def test_a_cut_of_the_sequence_adds_the_noise_of_the_whole() -> None:
    net, noise = model()
    given = batch()
    noise.see(given)
    whole = noise_of(net, noise, slice(0, ROWS), given)
    part = {key: value[:, 12:] for key, value in given.items()}
    assert torch.equal(noise_of(net, noise, slice(0, ROWS), part), whole[:, 12:])
    net.dropout_place.slice_rank = 1  # sequence parallel: the embedding gives this rank's slice
    net.set_dropout(seed=7, rows=torch.arange(ROWS))
    net.dropout_place.locate(given["position_ids"], given["document_ids"])
    zeros = torch.zeros(ROWS, LENGTH // 2, whole.shape[-1])
    assert torch.equal(noise(zeros), noise_of_slice(whole, given))


def noise_of_slice(whole: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The second half of what is added, free of the rounding of the sum with the embedding."""
    net, noise = model()
    noise.see(given)
    net.set_dropout(seed=7, rows=torch.arange(ROWS))
    net.dropout_place.locate(given["position_ids"], given["document_ids"])
    exact: Tensor = noise(torch.zeros_like(whole))
    assert torch.allclose(exact, whole, atol=1e-6)
    return exact[:, LENGTH // 2 :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_a_step_do_not_depend_on_micro_batches(family: str) -> None:
    net, noise = model(family)
    given = batch()
    noise.see(given)

    def gradients(size: int) -> list[Tensor]:
        net.zero_grad()
        for first in range(0, ROWS, size):
            rows = slice(first, first + size)
            net.set_dropout(seed=7, rows=torch.arange(ROWS)[rows])
            CausalLM().loss(net, {key: value[rows] for key, value in given.items()}).loss_sum.backward()
        return [p.grad.clone() for p in net.parameters()]

    for one, other in zip(gradients(ROWS), gradients(2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_added_outside_training_and_nothing_is_saved() -> None:
    net, _ = model()
    clean = build_model(LlamaConfig(**tiny_llama_config()), seed=1)
    net.eval()
    ids = batch()["input_ids"]
    assert torch.equal(net(ids), clean(ids))
    assert net.state_dict().keys() == clean.state_dict().keys()
    net.train()
    assert not torch.equal(net(ids), clean(ids)), "without rows torch's generator draws it"


def test_without_rows_the_generator_draws_noise_of_the_same_size() -> None:
    noise = EmbeddingNoise(ALPHA)
    added = noise(torch.zeros(4, 100, 64))
    assert float(added.abs().max()) == pytest.approx(ALPHA / math.sqrt(100 * 64), rel=0.01)


def test_lengths_of_texts() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert lengths_of({"input_ids": ids}).tolist() == [[4], [4]]
    assert lengths_of({"input_ids": ids, "key_mask": mask}).tolist() == [[2], [4]]
    documents = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 2]], dtype=torch.int32)
    assert lengths_of({"input_ids": ids, "document_ids": documents}).tolist() == [[3, 1, 0], [1, 2, 1]]


class Later(nn.Module):
    """A stage of a pipeline without the embedding."""

    embedding = None


def test_a_stage_without_an_embedding_has_nothing_to_add_to() -> None:
    assert isinstance(attach_embedding_noise(Later(), ALPHA), EmbeddingNoise)


@pytest.mark.parametrize("name", ["phi", "bert", "t5"])
def test_models_of_transformers_get_it_by_row(name: str) -> None:
    pytest.importorskip("transformers")
    from trainwright.models.hugging_face.config import HuggingFaceConfig

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    t5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    values = {"model_type": name, **(t5 if name == "t5" else {**small, "num_attention_heads": 2})}
    dropouts = {"dropout_rate": 0.0} if name == "t5" else {}
    if name == "bert":
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    net = build_model(HuggingFaceConfig({**values, **dropouts}), seed=1)
    ids = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([8, 5, 3, 8])
    more = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    net.eval()
    clean = net.hidden_states(ids, **more)
    noise = attach_embedding_noise(net, ALPHA)
    net.eval()
    assert torch.equal(net.hidden_states(ids, **more), clean)
    net.train()
    noise.see({"input_ids": ids, "lengths": lengths})

    def hidden(rows: slice) -> Tensor:
        net.set_dropout(seed=3, rows=torch.arange(4)[rows])
        return net.hidden_states(ids[rows], **{key: value[rows] for key, value in more.items()}).detach()

    whole = hidden(slice(0, 4))
    assert not torch.allclose(whole, clean)
    torch.testing.assert_close(torch.cat([hidden(slice(0, 2)), hidden(slice(2, 4))]), whole, rtol=1e-5, atol=1e-6)
