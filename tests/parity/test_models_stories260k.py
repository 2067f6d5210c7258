"""The real pretrained llama2.c model: its known greedy text, and the same model through a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.data import load_tokenizer
from trainwright.inference import GenerationOptions, Generator
from trainwright.models import load_pretrained, save_pretrained
from trainwright.models.llama.llama2c import load_llama2c

Find = Callable[[str], Path]
GREEDY = GenerationOptions(max_new_tokens=200, temperature=0.0)


def test_greedy_text_is_the_published_one(shared_data: Find) -> None:
    model = load_llama2c(shared_data("stories260K/stories260K.bin"))
    tokenizer = load_tokenizer(str(shared_data("stories260K/tok512.bin")))
    expected = shared_data("stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    (result,) = Generator(model, tokenizer).generate([[1]], GREEDY)
    assert len(result.token_ids) == 200
    assert result.text.lstrip(" ") == expected
    assert "".join(Generator(model, tokenizer).stream([1], GREEDY)).lstrip(" ") == expected


def test_cached_and_uncached_agree(shared_data: Find) -> None:
    model = load_llama2c(shared_data("stories260K/stories260K.bin"))
    tokenizer = load_tokenizer(str(shared_data("stories260K/tok512.bin")))
    (result,) = Generator(model, tokenizer).generate([[1]], GREEDY)
    ids = torch.tensor([[1, *result.token_ids]])
    with torch.no_grad():
        choices = model(ids).argmax(-1)[0, :-1]
    assert choices.tolist() == list(result.token_ids)


def test_exported_folder_opens_in_transformers(shared_data: Find, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_llama2c(shared_data("stories260K/stories260K.bin"))
    save_pretrained(model, tmp_path)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = load_pretrained(tmp_path)
    assert again.config.rotary_layout == "half"
    ids = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(reopened(ids).logits, expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(again(ids), expected, rtol=1e-5, atol=2e-5)


def test_greedy_equals_transformers_generate(shared_data: Find, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_llama2c(shared_data("stories260K/stories260K.bin"))
    tokenizer = load_tokenizer(str(shared_data("stories260K/tok512.bin")))
    save_pretrained(model, tmp_path)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = tokenizer.encode("Tom and his dog", add_special=True)
    theirs = reopened.generate(torch.tensor([prompt]), max_new_tokens=120, do_sample=False)[0, len(prompt) :]
    (ours,) = Generator(model, tokenizer).generate([prompt], GREEDY.replace(max_new_tokens=120))
    assert list(ours.token_ids) == theirs.tolist()


def test_cut_off_file_is_refused(shared_data: Find, tmp_path: Path) -> None:
    whole = shared_data("stories260K/stories260K.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:100_000])
    with pytest.raises(ModelError, match=r"cut\.bin ends early"):
        load_llama2c(tmp_path / "cut.bin")
    (tmp_path / "text.bin").write_text("this is not a model at all, honestly", encoding="utf-8")
    with pytest.raises(ModelError, match=r"not a llama2\.c version 0 file"):
        load_llama2c(tmp_path / "text.bin")
