"""Chats as examples: what the assistant writes is the label, and what does not fit leaves as whole turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.chat_encoding import ChatFormat, EncodedChat, TrainOn
from trainwright.data.examples.example import IGNORE, Encoded, Example, Feature

__all__ = ["ChatEncoder", "labelled_example"]

_VERSION = 1


def labelled_example(ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> Example | None:
    """Inputs and shifted labels of a text's tokens, up to its last trained one; None where no token but the first is
    trained."""
    wanted = np.flatnonzero(trained[1:])
    if not len(wanted):
        return None
    last = int(wanted[-1]) + 1
    labels = np.where(trained[1 : last + 1], ids[1 : last + 1], IGNORE)
    return Example({"input_ids": ids[:last].astype(np.int32), "labels": labels.astype(np.int32)})


class ChatEncoder:
    """Records with "messages" (and "tools"), or "text", to examples. See `ExampleEncoder`.

    Args:
        long: what becomes of chats with more than `max_length` inputs: "cut_turns", "cut_end", "drop" or "refuse".
    """

    packable = True
    features: tuple[Feature, ...] = (
        Feature("input_ids", "int32", "tokens"),
        Feature("labels", "int32", "tokens", pad=IGNORE),
    )

    def __init__(self, chat: ChatFormat, max_length: int, *, train_on: TrainOn, long: str) -> None:
        self.chat = chat
        self.max_length = max_length
        self.train_on = train_on
        self.long = long
        self.tokenizer = chat.tokenizer
        eos = self.tokenizer.eos_id  # ends running text, which may be all there is
        self.must_train_ids = tuple(dict.fromkeys((*chat.end_ids, *(() if eos is None else (eos,)))))
        facts = [_VERSION, chat.tokenizer.chat_template, chat.system, train_on, long, max_length]
        self.fingerprint = json.dumps(["chat", *facts], ensure_ascii=False)

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Raises DataError for malformed messages, what the template refuses, and long chats with long="refuse"."""
        if "messages" not in record:
            return self._text(record)
        messages = self.chat.messages(record["messages"])
        tools = record.get("tools")
        if self.train_on != "all" and not any(message["role"] == "assistant" for message in messages):
            return Encoded(dropped="no message of the assistant")
        reserved = self.chat.reserved(messages, tools)
        if reserved is not None:
            return Encoded(dropped=f"the chat holds the special token {reserved}")
        chat = self.chat.encode(messages, tools, train_on=self.train_on)
        example = labelled_example(chat.ids, chat.trained)
        if example is None:
            return _untrained(chat)
        if example.length <= self.max_length:
            return Encoded((example,))
        return self._long(messages, tools, chat, example)

    def _long(self, messages: list[dict[str, Any]], tools: Any, chat: EncodedChat, example: Example) -> Encoded:
        whole = example.length
        if self.long == "refuse":
            raise DataError(
                f"the chat has {whole:,} tokens; data.sequence_length is {self.max_length:,}",
                hint="raise data.sequence_length, or set task.long to cut_turns, cut_end or drop",
            )
        if self.long == "cut_end":
            kept = self.max_length + 1
            shorter = labelled_example(chat.ids[:kept], chat.trained[:kept])
            if shorter is None:
                return Encoded(dropped="nothing that is trained fits into data.sequence_length")
            return Encoded((shorter,), cut_tokens=whole - shorter.length)
        if self.long == "cut_turns":
            for rest in shortened(messages):
                part = self.chat.encode(rest, tools, train_on=self.train_on)
                fitting = labelled_example(part.ids, part.trained)
                if fitting is not None and fitting.length <= self.max_length:
                    return Encoded((fitting,), cut_tokens=whole - fitting.length)
        return Encoded(dropped="longer than data.sequence_length")

    def _text(self, record: Mapping[str, Any]) -> Encoded:
        """Running text beside chats: all of it is trained, with the end of text behind it."""
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError("a record has neither messages nor text", hint="expected the column messages")
        eos = self.tokenizer.eos_id
        ids = np.array(self.tokenizer.encode(text, parse_special=False) + ([] if eos is None else [eos]), np.int64)
        fitting = ids[: self.max_length + 1]
        if len(ids) > len(fitting) and self.long in ("drop", "refuse"):
            if self.long == "drop":
                return Encoded(dropped="longer than data.sequence_length")
            raise DataError(f"the text has {len(ids):,} tokens; data.sequence_length is {self.max_length:,}")
        example = labelled_example(fitting, np.ones(len(fitting), dtype=np.bool_))
        if example is None:
            return Encoded(dropped="a text of a single token")
        return Encoded((example,), cut_tokens=len(ids) - len(fitting))


def shortened(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The chat without its first turn, without its first two, ...: a turn begins with the user; system messages at the
    beginning stay."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    starts = [n for n in range(head + 1, len(messages)) if messages[n]["role"] == "user"]
    return [[*messages[:head], *messages[start:]] for start in starts]


def _untrained(chat: EncodedChat) -> Encoded:
    if chat.rewritten:
        return Encoded(dropped="the chat template changes or cuts every message of the assistant")
    return Encoded(dropped="nothing of the assistant to train on")
