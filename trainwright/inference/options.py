"""How text is generated, as one frozen value; and the same read from a `generation_config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainwright.base.errors import ConfigError

__all__ = ["Generation", "GenerationOptions", "options_from_hf"]

Overflow = Literal["slide", "stop", "error"]
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationOptions:
    """What is drawn from the model's distribution, and when to end.

    temperature: 0 takes the most likely token (greedy, ties to the lowest id); 1 is the distribution itself.
    top_k, top_p, min_p: keep the k likeliest tokens; the likeliest that together reach p (arXiv 1904.09751); those at
        least min_p times as likely as the likeliest (arXiv 2407.01082). None, 0, 1 and 0 switch them off.
    repetition_penalty: divides (or, below zero, multiplies) the logits of tokens seen before (arXiv 1909.05858).
    seed: of this request's own random stream; None draws a fresh one.
    stop: the text ends before the first of these strings, wherever token borders fall.
    eos_ids: ends the text; None takes the tokenizer's and the model's. Empty: nothing does.
    overflow: when the model's context is full: `slide` forgets the older half and goes on, `stop` ends there, `error`
        refuses the request before it starts.
    add_special: encode prompts with what the tokenizer adds for its model, such as `<s>` in front.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    overflow: Overflow = "slide"
    add_special: bool = True

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            ("overflow", self.overflow in ("slide", "stop", "error"), "slide, stop or error"),
        ):
            if not holds:
                raise ConfigError(f"generation option {name}={getattr(self, name)!r}; expected {expected}")

    def replace(self, **changes: Any) -> GenerationOptions:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Generation:
    """What came of one prompt.

    text: the continuation, without the prompt and without the stop string.
    token_ids: every id that was generated, those of a stop string and the end token included.
    finish_reason: `eos`, `stop` (a stop string), `length` (max_new_tokens) or `context` (full, with overflow="stop").
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


def options_from_hf(values: Mapping[str, Any]) -> GenerationOptions:
    """Defaults from a parsed `generation_config.json`.

    Sampling parameters count where `do_sample` is true; where it is false the text is greedy.
    """
    eos = values.get("eos_token_id")
    changes: dict[str, Any] = {}
    if values.get("do_sample") is False:
        changes["temperature"] = 0.0
    if values.get("do_sample"):
        changes["temperature"] = float(values.get("temperature") or 1.0)
        changes["top_k"] = values.get("top_k", 50)  # 50 is what transformers takes when the key is absent
        changes["top_p"] = float(values.get("top_p") or 1.0)
        changes["min_p"] = float(values.get("min_p") or 0.0)
    changes["repetition_penalty"] = float(values.get("repetition_penalty") or 1.0)
    if values.get("max_new_tokens"):
        changes["max_new_tokens"] = int(values["max_new_tokens"])
    if eos is not None:
        changes["eos_ids"] = tuple(eos) if isinstance(eos, list) else (int(eos),)
    return GenerationOptions(**changes)
