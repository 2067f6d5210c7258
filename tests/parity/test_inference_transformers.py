"""Generation against transformers: greedy text, and every logits processor in its order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.data import train_tokenizer
from trainwright.inference import GenerationOptions, Generator
from trainwright.inference.sampling import filter_logits
from trainwright.models import build_model, preset, save_pretrained

transformers = pytest.importorskip("transformers")

TOKENIZER = train_tokenizer("bpe", 320, ["你好，世界。", "hello world, how are you today?"] * 4)
CHANGES: dict[str, Any] = {"vocab_size": TOKENIZER.vocab_size, "initializer_range": 0.15}
NAMES = {
    "llama": preset("llama-1m", **CHANGES),
    "gpt2": preset("gpt2-nano", **CHANGES),
    "mistral": preset("llama-1m", **CHANGES, architecture="mistral", sliding_window=6),
}


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_generate(name: str, penalty: float, tmp_path: Path) -> None:
    model = build_model(NAMES[name], seed=6).eval()
    save_pretrained(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    generator = Generator(model, TOKENIZER)
    options = GenerationOptions(max_new_tokens=40, temperature=0.0, repetition_penalty=penalty, eos_ids=())
    prompts = ["hello", "你好，世", "how are you today? how are you"]
    for prompt, result in zip(prompts, generator.generate(prompts, options), strict=True):
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        mask = torch.ones_like(ids)
        theirs = reference.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=False, repetition_penalty=penalty
        )
        assert list(result.token_ids) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    list(itertools.product([0.7, 1.0, 1.6], [0, 5], [0.8, 1.0], [0.0, 0.08], [1.0, 1.3])),
)
def test_filters_equal_the_logits_processors(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 200, generator=generator) * 3
    history = torch.randint(0, 200, (6, 30), generator=generator)
    seen = torch.zeros(6, 200, dtype=torch.bool).scatter_(1, history, True)
    options = GenerationOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    ours = filter_logits(logits, options, seen)
    theirs = processors(temperature, top_k, top_p, min_p, penalty)(history, logits.clone())
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def processors(temperature: float, top_k: int, top_p: float, min_p: float, penalty: float) -> Any:
    """The list that transformers itself builds for these settings."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p or None,
        repetition_penalty=penalty,
    )
    config, _ = model._prepare_generation_config(config)
    return model._get_logits_processor(
        config,
        input_ids_seq_length=30,
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        logits_processor=transformers.LogitsProcessorList(),
        device="cpu",
    )
