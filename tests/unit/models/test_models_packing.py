"""Packed documents do not see each other; the cache and padding change nothing."""

from __future__ import annotations

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.models import Decoder, build_model, preset, replace

FAMILIES = {
    "llama": preset("llama-1m", vocab_size=101, initializer_range=0.1, max_position_embeddings=256),
    "mistral": replace(
        preset("llama-1m"), vocab_size=101, initializer_range=0.1, architecture="mistral", sliding_window=7
    ),
    "gpt2": preset("gpt2-nano", vocab_size=101, initializer_range=0.1, max_position_embeddings=256, bias=True),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return build_model(FAMILIES[request.param], seed=1).eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("lengths", [(5, 1, 20, 14), (100, 60, 40)])
def test_packed_row_equals_single_documents(model: Decoder, lengths: tuple[int, ...]) -> None:
    """The second case is long enough for the blocked attention backend."""
    documents = [draw(1, length) for length in lengths]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    owners = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None].int()
    with torch.no_grad():
        together = model(packed, position_ids=positions, document_ids=owners)
        alone = torch.cat([model(document) for document in documents], dim=1)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(packed, position_ids=positions), alone, atol=1e-3), "the mask does something"


@pytest.mark.parametrize("backend", ["reference", "grouped", "blocked", "sdpa"])
def test_attention_backends_agree(model: Decoder, backend: str) -> None:
    ids = draw(2, 200)
    with torch.no_grad():
        expected = model(ids)
        model.set_attention_backend(backend)
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=2e-5)
        cache = model.make_cache(2, 200)
        model(ids[:, :150], cache=cache)
        torch.testing.assert_close(model(ids[:, 150:], cache=cache), expected[:, 150:], rtol=1e-4, atol=2e-5)
    with pytest.raises(ModelError, match="warp"):
        model.set_attention_backend("warp")


def test_packed_gradients_equal_single_documents(model: Decoder) -> None:
    first, second = draw(1, 9), draw(1, 30)
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(9), torch.arange(30)))[None]
    owners = torch.tensor([[0] * 9 + [1] * 30], dtype=torch.int32)
    model(packed, position_ids=positions, document_ids=owners).logsumexp(-1).sum().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    (model(first).logsumexp(-1).sum() + model(second).logsumexp(-1).sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunks", [(30,), (1,) * 30, (11, 1, 1, 17), (25, 1, 1, 1, 1, 1)])
def test_cache_in_any_chunks_equals_one_pass(model: Decoder, chunks: tuple[int, ...]) -> None:
    ids = draw(2, 30)
    cache = model.make_cache(2, 64)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(list(chunks), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-5, atol=1e-5)
    assert cache.length == 30


def test_left_padding_changes_nothing(model: Decoder) -> None:
    short, long = draw(1, 6), draw(1, 20)
    ids = torch.cat((torch.cat((torch.zeros(1, 14, dtype=torch.long), short), dim=1), long))
    padding = torch.tensor([14, 0])
    mask = torch.arange(24)[None] >= padding[:, None]
    positions = (torch.arange(20)[None] - padding[:, None]).clamp_min(0)
    cache = model.make_cache(2, 24)
    with torch.no_grad():
        first = model(ids, position_ids=positions, cache=cache, key_mask=mask[:, :20])
        torch.testing.assert_close(first[0, 14:], model(short)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first[1], model(long)[0], rtol=1e-5, atol=1e-5)
        new = draw(2, 4)
        after = torch.stack([torch.arange(6, 10), torch.arange(20, 24)])
        second = model(new, position_ids=after, cache=cache, key_mask=mask)
        torch.testing.assert_close(second[0], model(torch.cat((short, new[:1]), 1))[0, 6:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second[1], model(torch.cat((long, new[1:]), 1))[0, 20:], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(first).all()
