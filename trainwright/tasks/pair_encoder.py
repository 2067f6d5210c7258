"""Sources and targets as examples: one text for a decoder, two for an encoder-decoder.

The prompt of serving is cut exactly as in training: a source may have as many tokens as the longest target leaves,
whether the target of this example is short or not known at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.examples.example import IGNORE, Encoded, Example, ExampleEncoder, Feature
from trainwright.data.token_offsets import encode_offsets, overhang, reserved_pattern
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.tasks.chat_encoder import labelled_example

__all__ = ["DecoderPairs", "EncoderDecoderPairs", "PairEncoder", "PairTemplate", "shorter_text"]

_VERSION = 1
_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_LONG = "longer than data.sequence_length"


class PairTemplate:
    """A text with {source} and, at its end, {target}.

    Raises ConfigError where one of them is missing, or something stands behind {target}.
    """

    def __init__(self, text: str) -> None:
        head, source, rest = text.partition("{source}")
        middle, target, behind = rest.partition("{target}")
        if not source or not target or behind or "{source}" in rest:
            raise ConfigError(
                f"task.template is {text!r}; expected a text with {{source}} once and {{target}} at its end",
                hint='for example "{source}\\n=>\\n{target}"; the end token is added behind the target',
            )
        self.text = text
        self.head, self.middle = head, middle

    def prompt(self, source: str) -> str:
        """What stands before the target."""
        return self.head + source + self.middle

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens such as <|en|> that a tokenizer which is trained gets, sorted."""
        return tuple(sorted(set(_TOKEN.findall(self.text))))


class PairEncoder(ExampleEncoder, Protocol):
    """An encoder of pairs that also makes the prompt of serving."""

    def prompt(self, source: str) -> list[int]: ...


class _Pairs:
    """What both kinds share: the options, the end token, texts that cannot be trained on."""

    def __init__(
        self, tokenizer: Tokenizer, template: PairTemplate, max_length: int, *, max_target: int, long: str
    ) -> None:
        if tokenizer.eos_id is None:
            raise DataError(
                "the tokenizer has no token that ends a text: the model could never learn to stop",
                hint="name eos_token in tokenizer_config.json, or let the recipe train a tokenizer",
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.max_target = max_target
        self.long = long
        self.eos_id = tokenizer.eos_id
        self.must_train_ids = (tokenizer.eos_id,)
        self._reserved = reserved_pattern(tokenizer)
        facts = [_VERSION, type(self).__name__, template.text, max_length, max_target, long]
        self.fingerprint = json.dumps(facts, ensure_ascii=False)

    def _problem(self, source: str, target: str) -> str | None:
        if not target.strip():
            return "an empty target"
        found = self._reserved.search(source) or self._reserved.search(target)
        return f"a text holds the special token {found[0]}" if found else None

    def _too_long(self, what: str, tokens: int, limit: int) -> Encoded:
        """What becomes of a pair that may not be cut."""
        if self.long == "drop":
            return Encoded(dropped=_LONG)
        raise DataError(
            f"the {what} has {tokens:,} tokens; data.sequence_length of {self.max_length:,} leaves {limit:,} for it",
            hint="raise data.sequence_length, change task.max_target_tokens, or set task.long to cut or drop",
        )


class DecoderPairs(_Pairs):
    """Prompt and target in one text; the target and the end token behind it are trained.

    Args:
        whole: train the prompt too.
    """

    packable = True
    features: tuple[Feature, ...] = (
        Feature("input_ids", "int32", "tokens"),
        Feature("labels", "int32", "tokens", pad=IGNORE),
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PairTemplate,
        max_length: int,
        *,
        max_target: int,
        long: str,
        whole: bool = False,
    ) -> None:
        super().__init__(tokenizer, template, max_length, max_target=max_target, long=long)
        self.whole = whole
        self.fingerprint += " whole" * whole
        self.overhang = overhang(tokenizer, template.prompt("x"))
        self.max_prompt = max_length - max_target
        needed = len(encode_offsets(tokenizer, template.prompt("")).ids) + 1
        if self.max_prompt < needed:
            raise ConfigError(
                f"data.sequence_length {max_length} leaves {self.max_prompt} tokens beside task.max_target_tokens "
                f"{max_target}; the template alone needs {needed}",
                hint="raise data.sequence_length or lower task.max_target_tokens",
            )

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Raises DataError for a pair that is too long with long="refuse", and for one without target."""
        source, target = _texts(record)
        problem = self._problem(source, target)
        if problem is not None:
            return Encoded(dropped=problem)
        shown, prompt_tokens, cut = self._fit(source)
        if cut and self.long != "cut":
            return self._too_long("source", prompt_tokens + cut, self.max_prompt)
        prompt = self.template.prompt(shown)
        tokens = encode_offsets(self.tokenizer, prompt + target)
        of_target = tokens.inside(len(prompt) - self.overhang, len(prompt) + len(target))
        ids = np.append(tokens.ids, self.eos_id)
        wanted = np.append(of_target, True)
        excess = int(wanted.sum()) - self.max_target
        if excess > 0:
            if self.long != "cut":
                return self._too_long("target", int(wanted.sum()), self.max_target)
            ids, wanted, cut = ids[:-excess], wanted[:-excess], cut + excess
        example = labelled_example(ids, np.ones_like(wanted) if self.whole else wanted)
        assert example is not None, "a target has tokens"
        return Encoded((example,), cut_tokens=cut)

    def prompt(self, source: str) -> list[int]:
        """What the model goes on from: the ids that stand before the target in training."""
        text = self.template.prompt(self._fit(source.strip())[0])
        tokens = encode_offsets(self.tokenizer, text)
        return [int(i) for i in tokens.ids[tokens.ends <= len(text) - self.overhang]]

    def _fit(self, source: str) -> tuple[str, int, int]:
        return shorter_text(
            source, lambda text: len(encode_offsets(self.tokenizer, self.template.prompt(text)).ids), self.max_prompt
        )


class EncoderDecoderPairs(_Pairs):
    """The source for the encoder, with the special tokens that the tokenizer adds; the target for the decoder."""

    packable = False
    features: tuple[Feature, ...] = (
        Feature("input_ids", "int32", "tokens"),
        Feature("labels", "int32", "target", pad=IGNORE),
        Feature("decoder_input_ids", "int32", "target"),
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PairTemplate,
        max_length: int,
        *,
        max_target: int,
        long: str,
        decoder_start: int,
    ) -> None:
        super().__init__(tokenizer, template, max_length, max_target=max_target, long=long)
        self.decoder_start = decoder_start
        self.fingerprint += f" {decoder_start}"

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Raises DataError for a pair that is too long with long="refuse", and for one without target."""
        source, target = _texts(record)
        problem = self._problem(source, target)
        if problem is not None:
            return Encoded(dropped=problem)
        shown, tokens, cut = self._fit(source)
        if cut and self.long != "cut":
            return self._too_long("source", tokens + cut, self.max_length)
        labels = self._with_end(target)
        excess = len(labels) - self.max_target
        if excess > 0:
            if self.long != "cut":
                return self._too_long("target", len(labels), self.max_target)
            labels, cut = labels[:-excess], cut + excess
        arrays = {
            "input_ids": self._with_end(self._text(shown)),
            "labels": labels,
            "decoder_input_ids": [self.decoder_start, *labels[:-1]],
        }
        return Encoded(
            (Example({name: np.array(ids, dtype=np.int32) for name, ids in arrays.items()}),), cut_tokens=cut
        )

    def prompt(self, source: str) -> list[int]:
        """What the encoder reads."""
        return self._with_end(self._text(self._fit(source.strip())[0]))

    def _text(self, source: str) -> str:
        return self.template.prompt(source).strip()

    def _with_end(self, text: str) -> list[int]:
        """Ids with what the tokenizer adds around a text; the end token where it adds none (one that was trained)."""
        ids = self.tokenizer.encode(text, add_special=True)
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def _fit(self, source: str) -> tuple[str, int, int]:
        return shorter_text(source, lambda text: len(self._with_end(self._text(text))), self.max_length)


def shorter_text(text: str, tokens_of: Callable[[str], int], limit: int) -> tuple[str, int, int]:
    """The longest beginning of a text, in characters, with at most `limit` tokens; its tokens; how many were cut off.

    By halving: a longer beginning hardly ever has fewer tokens, and where it does the result still fits.
    """
    whole = tokens_of(text)
    if whole <= limit:
        return text, whole, 0
    fitting, beyond = 0, len(text)
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if tokens_of(text[:middle].rstrip()) <= limit:
            fitting = middle
        else:
            beyond = middle
    shown = text[:fitting].rstrip()
    tokens = tokens_of(shown)
    return shown, tokens, whole - tokens


def _texts(record: Mapping[str, Any]) -> tuple[str, str]:
    if not isinstance(record.get("target"), str):
        raise DataError("a record has no target to learn", hint="expected the columns source and target")
    return record["source"].strip(), record["target"].strip()
