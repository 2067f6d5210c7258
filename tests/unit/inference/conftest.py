"""A tiny model and tokenizers that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trainwright.data import Tokenizer, train_tokenizer
from trainwright.inference import Generator
from trainwright.models import Decoder, build_model, preset

TEXTS = ["你好，世界。今天天气很好。", "hello world, how are you today?", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models on one thread: with several the cores are spent on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", 320, TEXTS * 4)


@pytest.fixture(scope="session", params=["llama", "mistral", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    """Large random weights, so that distributions are far from flat and every token matters for the next."""
    changes: dict[str, Any] = {"max_position_embeddings": 96, "initializer_range": 0.15}
    changes["vocab_size"] = tokenizer.vocab_size
    if request.param == "mistral":
        changes |= {"architecture": "mistral", "sliding_window": 10}
    return build_model(preset("gpt2-nano" if request.param == "gpt2" else "llama-1m", **changes), seed=4).eval()


@pytest.fixture
def generator(model: Decoder, tokenizer: Tokenizer) -> Generator:
    return Generator(model, tokenizer)
