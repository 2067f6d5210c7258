"""Writing answers: native decoders write what transformers writes, greedy and by beams; batches change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_runs import TINY, VOCABULARY, tiny_config
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.inference.write import write
from trainwright.models import Decoder, HeadSpec, attach_head, build_model, load_pretrained, save_pretrained
from trainwright.models.registry import config_from_dict

transformers = pytest.importorskip("transformers")

STOPS = (2, 5, 6, 7, 8)


def lively(model: Any) -> Any:
    """Weights so large that one token follows the other clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(9, VOCABULARY, (size,), generator=generator).tolist() for size in (5, 9, 3, 7)]


def transformers_writes(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """By a class of transformers itself, one prompt without padding."""
    theirs = model.config.model_class(
        transformers.AutoConfig.for_model(model.config.values["model_type"], **_fields_of(model))
    )
    theirs.load_state_dict(model.state_dict())
    written: Tensor = theirs.eval().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options
    )
    ids = written[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
    end = next((place for place, token in enumerate(ids) if token in STOPS), len(ids))
    return ids[: end + 1]


def _fields_of(model: Any) -> dict[str, Any]:
    return TINY[model.config.values["model_type"]]


@pytest.mark.parametrize("name", ["phi", "bloom", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_transformers_writes_whatever_stands_beside(name: str, beams: int) -> None:
    model = lively(build_model(tiny_config(name), seed=1))
    together = write(model, prompts(), max_new_tokens=8, stop_ids=STOPS, beams=beams)
    apart = write(model, prompts(), max_new_tokens=8, stop_ids=STOPS, beams=beams, batch_rows=1)
    assert together == apart
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": list(STOPS)}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = model.decoder_start_id
    for prompt, ids in zip(prompts(), together, strict=True):
        assert ids == transformers_writes(model, prompt, **options)
    assert any(len(ids) > 1 for ids in together)
    assert model.training


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_native_decoders_write_the_same(name: str, tmp_path: Path) -> None:
    theirs = lively(build_model(tiny_config(name), seed=1))
    save_pretrained(theirs, tmp_path)
    native = load_pretrained(tmp_path)
    assert isinstance(native, Decoder)
    for beams in (1, 2, 4):
        for length_penalty in (0.0, 1.0, 2.0):
            options: dict[str, Any] = {"stop_ids": STOPS, "beams": beams, "length_penalty": length_penalty}
            expected = write(theirs, prompts(), max_new_tokens=12, **options)
            assert write(native, prompts(), max_new_tokens=12, **options) == expected, options


def test_sampling_depends_on_seed_and_prompt_alone() -> None:
    model = lively(build_model(config_from_dict(tiny_config("llama").to_hf()), seed=1))
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0}
    one = write(model, prompts(), seed=1, **options)
    assert one == write(model, prompts(), seed=1, batch_rows=2, **options)
    assert one != write(model, prompts(), seed=2, **options)


def test_words_beyond_the_tokenizer_are_never_written() -> None:
    for config in (tiny_config("phi"), config_from_dict(tiny_config("llama").to_hf())):
        model = lively(build_model(config, seed=1))
        for beams in (1, 2):
            written = write(model, prompts(), max_new_tokens=8, vocab_size=30, beams=beams)
            assert all(token < 30 for ids in written for token in ids)


def test_what_cannot_be_written_is_refused() -> None:
    model = build_model(tiny_config("phi"))
    with pytest.raises(ModelError, match="a prompt is empty"):
        write(model, [[]], max_new_tokens=2)
    with pytest.raises(ModelError, match="64 positions"):
        write(model, [[3] * 60], max_new_tokens=10)
    with pytest.raises(ModelError, match="do not go together"):
        write(model, [[3]], max_new_tokens=2, beams=2, temperature=1.0)
    with pytest.raises(ModelError, match="does not write"):
        write(build_model(tiny_config("deberta-v2")), [[3]], max_new_tokens=2)
    with pytest.raises(ModelError, match="gives scores, not words"):
        write(attach_head(model, HeadSpec("sequence", ("a", "b"))), [[3]], max_new_tokens=2)
    assert write(build_model(tiny_config("phi")), [], max_new_tokens=2) == []


def test_generation_token_by_token_uses_their_cache() -> None:
    model = lively(build_model(tiny_config("phi"), seed=1)).eval()
    ids = torch.tensor([prompts()[1]])
    whole = model.hidden_states(ids)
    cache = model.make_cache(1, 16)
    first = model.hidden_states(ids[:, :4], position_ids=torch.arange(4)[None], cache=cache)
    rest = model.hidden_states(ids[:, 4:], position_ids=torch.arange(4, 9)[None], cache=cache)
    assert torch.allclose(torch.cat((first, rest), 1), whole, atol=1e-4)
    assert cache.length == 9
    with pytest.raises(ModelError, match="cannot be continued token by token"):
        build_model(tiny_config("t5")).make_cache(1, 8)
