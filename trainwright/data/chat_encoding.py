"""Chats as token ids, with a mask of what the assistant writes: one rendering, one tokenisation, offsets.

A token is trained when it holds any character that the assistant writes. Where tokens can reach over the border of
prompt and answer (`: ` and `Hello` become `:` and ` Hello`), the end of the prompt belongs to the answer: it is
trained, and prompts of serving stop before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.chat_messages import plain_messages, strings_in
from trainwright.data.chat_spans import ChatRenderer, Rendering, Turn
from trainwright.data.chat_templates import special_variables, with_template
from trainwright.data.token_offsets import (
    USUAL_ANSWERS,
    TokenOffsets,
    encode_offsets,
    overhang,
    reserved_pattern,
    speakable,
)
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["ChatFormat", "EncodedChat", "TrainOn"]

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        ids: [tokens] int64.
        trained: [tokens] bool, what the assistant writes and learns.
        rewritten: assistant messages that the template shows without a part of their content (old thoughts); they are
            not trained, since the model would learn to answer without it.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    rewritten: int = 0


class ChatFormat:
    """How chats become tokens for one model: its tokenizer and the one template of training and serving.

    Args:
        template: "auto" (see `choose_template`), a built-in name, a file, or Jinja text.
        system: a system message for chats that bring none.

    Attributes:
        tokenizer: the tokenizer with that template as its own; save this one.
        end_ids: tokens that end the assistant's last message; must be learnt, or the model never stops.
        stop_ids: all tokens at which a written answer ends.

    Raises:
        DataError: the template writes no end of turn that is a token of this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto", *, system: str | None = None) -> None:
        self.tokenizer = with_template(tokenizer, template)
        source = self.tokenizer.chat_template
        assert source is not None, "with_template always sets one"
        self.renderer = ChatRenderer(source, special_variables(tokenizer))
        self.system = system
        unknown = {tokenizer.unk_id}
        self._added = frozenset(tokenizer.core.get_added_tokens_decoder()) - unknown
        self._special = tokenizer.special_ids - unknown
        self._probe = speakable(tokenizer)
        self.end_ids = (self._end_of_turn(turns=1),)
        later = self._end_of_turn(turns=2)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.stop_ids = tuple(dict.fromkeys((*self.end_ids, later, *self._end_of_call(), *eos)))
        self._reserved = reserved_pattern(tokenizer, self.stop_ids)
        self._overhang = self._measure_overhang()

    # ---- to tokens

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template gets them, the system message added where there is none.

        Raises DataError for a malformed message.
        """
        plain = plain_messages(messages)
        if self.system is not None and not any(message["role"] == "system" for message in plain):
            plain.insert(0, {"role": "system", "content": self.system})
        return plain

    def reserved(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str | None:
        """A special token that somebody wrote in a message, in the arguments of a call, or in a tool: it would be read
        as the template's own. None without."""
        for text in strings_in([messages, tools]):
            match = self._reserved.search(text)
            if match is not None:
                return match[0]
        return None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        train_on: TrainOn = "assistant",
    ) -> EncodedChat:
        """Tokens of `self.messages(...)` and which of them are trained: all of the assistant's, or those of its last
        message, or all. A message with "weight": 0 is not trained.

        Raises DataError where the template refuses the messages or hides what the assistant wrote.
        """
        rendering = self.renderer.render(messages, tools)
        tokens = encode_offsets(self.tokenizer, rendering.text)
        if train_on == "all":
            return EncodedChat(tokens.ids, np.ones(len(tokens.ids), dtype=np.bool_))
        trained = np.zeros(len(tokens.ids), dtype=np.bool_)
        turns = _last_message(rendering.turns, messages) if train_on == "last" else rendering.turns
        unwanted = {number for number, message in enumerate(messages) if message.get("weight", 1) == 0}
        if unwanted and any(turn.message < 0 for turn in turns):
            raise DataError(
                "a message has weight 0, and it cannot be told which of the template's {% generation %} tags are its",
                hint="put one pair of the tags around each message of the assistant",
            )
        for turn in turns:
            if turn.whole and turn.message not in unwanted:
                trained |= self._of_turn(rendering, tokens, turn)
        return EncodedChat(tokens.ids, trained, sum(not turn.whole for turn in turns))

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Ids from which the model goes on as the assistant: what stands before its first trained token in training."""
        text = self.renderer.text(messages, tools, add_generation_prompt=True)
        tokens = encode_offsets(self.tokenizer, text)
        return [int(i) for i in tokens.ids[tokens.ends <= len(text) - self._overhang]]

    def said(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The assistant's last message as the template writes it, tool calls included, without the end of its turn."""
        encoded = self.encode(messages, tools, train_on="last")
        ids = [int(i) for i in encoded.ids[encoded.trained] if int(i) not in self.stop_ids]
        return self.tokenizer.decode(ids).strip()

    # ---- ends of turns

    def _of_turn(self, rendering: Rendering, tokens: TokenOffsets, turn: Turn) -> NDArray[np.bool_]:
        """Tokens of a turn and the one that ends it."""
        added = (tokens.ends <= turn.start) & np.isin(tokens.ids, list(self._added))
        # an added token never joins its neighbours: what stands before one is no part of the answer
        start, end = max(turn.start - self._overhang, int(tokens.ends[added].max(initial=0))), turn.end
        if end is None:
            first = int(np.searchsorted(tokens.starts, turn.start))
            limit = len(rendering.text) if turn.limit is None else turn.limit
            ends = np.flatnonzero(np.isin(tokens.ids[first:], self.stop_ids) & (tokens.ends[first:] <= limit))
            if not len(ends):
                raise DataError(
                    f"message {turn.message + 1} (assistant) is not ended by any of the tokens {self._names()}",
                    hint="choose a template that ends every message of the assistant",
                )
            return tokens.inside(start, int(tokens.ends[first + ends[0]]))
        trained = tokens.inside(start, end)
        closing = self._closing(rendering.text, tokens, turn.start, end)
        if closing is not None:
            trained[int(np.searchsorted(tokens.starts, end)) : closing + 1] = True
        return trained

    def _closing(self, text: str, tokens: TokenOffsets, start: int, end: int) -> int | None:
        """Number of the token that ends what the assistant writes in characters [start, end): the last one, where it is
        a special token (tags may enclose it), else an added one with nothing but white space before it."""
        for number in reversed(np.flatnonzero(tokens.inside(start, end))):
            if int(tokens.ids[number]) in self._special:
                return int(number)
            if text[tokens.starts[number] : tokens.ends[number]].strip():
                break
        for number in range(int(np.searchsorted(tokens.starts, end)), len(tokens.ids)):
            if int(tokens.ids[number]) in self._added:
                return number
            if text[tokens.starts[number] : tokens.ends[number]].strip():
                break
        return None

    def _end_of_turn(self, turns: int) -> int:
        """The token that ends the assistant's first message in a conversation of so many turns."""
        rendering = self.renderer.render([*self._question(), self._answer(self._probe)] * turns)
        turn = next(iter(rendering.turns), None)
        if turn is None or turn.end is None:
            raise DataError("the chat template does not write out what the assistant says", hint="choose another")
        tokens = encode_offsets(self.tokenizer, rendering.text)
        closing = self._closing(rendering.text, tokens, turn.start, turn.end)
        if closing is None:
            seen = rendering.text[turn.end : turn.end + 40]
            raise DataError(
                f"the chat template writes {seen!r} behind the assistant's message, where no special token of this "
                "tokenizer stands: the model could never learn to stop",
                hint="choose a template that ends messages with eos_token, such as task.template=plain or zephyr, or "
                "let the recipe train the tokenizer (data.tokenizer), which then gets the template's tokens",
            )
        return int(tokens.ids[closing])

    def _end_of_call(self) -> tuple[int, ...]:
        """The token that ends a message which calls a tool; none where the template has no place for such messages."""
        name = self._probe
        call = {"id": "000000000", "type": "function", "function": {"name": name, "arguments": {}}}
        schema = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
        asked = [*self._question(), {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            rendering = self.renderer.render(asked, [{"type": "function", "function": schema}])
            tokens = encode_offsets(self.tokenizer, rendering.text)
        except DataError:
            return ()
        turn = next((turn for turn in rendering.turns if turn.whole), None)
        closing = None if turn is None else self._closing(rendering.text, tokens, turn.start, len(rendering.text))
        return () if closing is None else (int(tokens.ids[closing]),)

    def _names(self) -> str:
        return ", ".join(str(self.tokenizer.token(i)) for i in self.stop_ids)

    # ---- the border of the prompt

    def _measure_overhang(self) -> int:
        prompt = self.renderer.text(self._question(), add_generation_prompt=True)
        chats = [[*self._question(), self._answer(answer)] for answer in USUAL_ANSWERS]
        return overhang(self.tokenizer, prompt, [self.renderer.text(messages) for messages in chats])

    def _question(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self._probe}]

    def _answer(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}


def _last_message(turns: Sequence[Turn], messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns of the assistant's last message; the last turn where it cannot be told whose it is."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return list(turns[-1:]) if any(turn.message < 0 for turn in turns) else [t for t in turns if t.message == last]
