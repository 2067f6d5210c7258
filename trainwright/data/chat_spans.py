"""Where in a rendered chat the assistant speaks: character spans of one rendering.

Nothing is put together from separately rendered parts. The whole chat is rendered once; further renderings only find
out *where* things stand in it, and each finding is proved against it:

- `{% generation %}` tags, where a template has them, are rendered with marks around them; without the marks the text
  must be the same.
- A turn begins where the prompt of serving ends: the messages before it, rendered with the generation prompt, must be a
  beginning of the whole text. Templates that write earlier messages otherwise once a later one comes (they leave out
  old thoughts) fail this proof; then the turn begins behind the generation prompt that stands between what the message
  before says and what this one says (or the mark of its first call), else with its content.
- Its content ends where a mark behind it stands; without the mark the text must be the same.

The marks are Unicode noncharacters (U+FDD0 and U+FDD1), which no text holds.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.templates import render_chat

__all__ = ["ChatRenderer", "Rendering", "Turn"]

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_PROBE = [{"role": "user", "content": "."}]

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Turn:
    """What one assistant message is in the text.

    Attributes:
        message: its number among the messages; -1 where it cannot be told whose the tags are.
        start, end: characters [start, end) that the assistant writes, without what ends the turn; `end` is None where
            only that shows it (a message that is nothing but tool calls).
        whole: whether the template kept all of the message's content. Of one that it did not, `start` may be 0.
        limit: first character of what the next message says, where that is known: the turn has ended before it.
    """

    message: int
    start: int
    end: int | None
    whole: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Rendering:
    """A chat as text, and the assistant's turns in it, in order."""

    text: str
    turns: tuple[Turn, ...]


class ChatRenderer:
    """A template with the values that it is always rendered with (bos_token, eos_token, ...)."""

    def __init__(self, template: str, variables: Mapping[str, Any] | None = None) -> None:
        self.template = template
        self.variables = dict(variables or {})
        self.has_tags = _TAG.search(_COMMENT.sub("", template)) is not None
        self.reads_thoughts = "reasoning_content" in template
        prompt = self._or_none(_PROBE, None, add_generation_prompt=True)
        bare = self._or_none(_PROBE, None)
        known = prompt is not None and bare is not None and prompt.startswith(bare)
        self.generation_prompt = prompt[len(bare) :] if known and prompt and bare is not None else ""

    def text(
        self,
        messages: Messages,
        tools: Tools = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The chat as text. Raises DataError where the template refuses it."""
        return render_chat(
            self.template, messages, tools=tools, add_generation_prompt=add_generation_prompt, **self.variables
        )

    def render(self, messages: Messages, tools: Tools = None) -> Rendering:
        """The chat as text with the assistant's turns.

        Raises DataError where the template refuses the messages, leaves out a tool or a tool call, or where it cannot
        be told what the assistant wrote.
        """
        if _MARKS.search(json.dumps(messages, ensure_ascii=False)):
            raise DataError(
                "a message holds U+FDD0 or U+FDD1, which are no characters", hint="remove them from the data"
            )
        text = self.text(messages, tools)
        for name in _tool_names(tools):
            if name not in text:
                raise DataError(
                    f"the chat template does not show the tool {name!r} to the model",
                    hint="choose a template with tools, such as chatml, or leave out the column 'tools'",
                )
        if self.has_tags:
            return Rendering(text, self._tagged(text, messages, tools))
        ends = self._marked(text, messages, tools)
        turns = tuple(
            self._turn(text, messages, tools, number, ends.get(number))
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        )
        _check_order(turns)
        return Rendering(text, turns)

    # ---- by generation tags

    def _tagged(self, text: str, messages: Messages, tools: Tools) -> tuple[Turn, ...]:
        marked = self._with_tags_marked(messages, tools)
        if _MARKS.sub("", marked) != text:
            raise DataError(
                "the chat template changes what its {% generation %} tags enclose after the fact",
                hint="put the tags directly around what is written out",
            )
        spans = list(zip(_positions(marked, _OPEN), _positions(marked, _CLOSE), strict=True))
        owners = self._owners(messages, tools, [start for start, _ in spans])
        shown: dict[int, str] = {}
        for number, (start, end) in zip(owners, spans, strict=True):
            shown[number] = shown.get(number, "") + text[start:end]
        kept = {number: number < 0 or self._kept(messages[number], seen) for number, seen in shown.items()}
        return tuple(
            Turn(number, start, end, kept[number])
            for number, (start, end) in zip(owners, spans, strict=True)
            if start < end
        )

    def _with_tags_marked(self, messages: Messages, tools: Tools) -> str:
        return render_chat(self.template, messages, tools=tools, generation_marks=(_OPEN, _CLOSE), **self.variables)

    def _owners(self, messages: Messages, tools: Tools, starts: Sequence[int]) -> list[int]:
        """The number of the message that each span of tags belongs to. Where messages have no or several spans, it is
        the first of the assistant's up to which the template writes that span; -1 where that does not tell."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(numbers) == len(starts):
            return numbers
        owners: list[int] = []
        for number in numbers:
            try:
                known = _positions(self._with_tags_marked(messages[: number + 1], tools), _OPEN)
            except DataError:
                return [-1] * len(starts)
            if known != list(starts[: len(known)]) or len(known) < len(owners):
                return [-1] * len(starts)
            owners += [number] * (len(known) - len(owners))
        return owners if len(owners) == len(starts) else [-1] * len(starts)

    # ---- by marks and prompts

    def _marked(self, text: str, messages: Messages, tools: Tools) -> dict[int, tuple[int | None, int]]:
        """Message to (first character of its content, first behind it); the first is None where the template cut it."""
        numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and _content(message)]
        together = self._positions(text, messages, tools, numbers, both=True)
        if together is not None:
            return dict(zip(numbers, together, strict=True))
        found: dict[int, tuple[int | None, int]] = {}
        for number in numbers:
            for both in (True, False):
                spans = self._positions(text, messages, tools, [number], both=both)
                if spans is not None:
                    found[number] = spans[0]
                    break
        return found

    def _positions(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        numbers: Sequence[int],
        *,
        both: bool,
    ) -> list[tuple[int | None, int]] | None:
        """Where the contents of these messages stand, None unless the rendering with marks proves it."""
        changed = [
            {**message, "content": _with_marks(_content(message), both)} if number in numbers else message
            for number, message in enumerate(messages)
        ]
        marked = self._or_none(changed, tools)
        if marked is None or _MARKS.sub("", marked) != text:
            return None
        starts, ends = _positions(marked, _OPEN), _positions(marked, _CLOSE)
        if len(ends) != len(numbers) or len(starts) != (len(numbers) if both else 0):
            return None
        return list(zip(starts if both else [None] * len(ends), ends, strict=True))

    def _turn(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        number: int,
        content: tuple[int | None, int] | None,
    ) -> Turn:
        message = messages[number]
        first, end = content if content is not None else (None, None)
        if message.get("tool_calls"):
            end = None  # calls stand behind the content, or the content is none
        start = self._start(text, messages, tools, number, first)
        if start is None and message.get("tool_calls"):
            start = self._start_of_call(text, messages, tools, number)
        if start is None and not self._kept(message, text):
            return Turn(number, 0, None, whole=False)
        if start is None:
            raise DataError(
                f"message {number + 1} (assistant) cannot be found in what the chat template writes: the template "
                "changes both the message and what stands before it",
                hint="mark what the assistant writes with {% generation %} ... {% endgeneration %} in the template, "
                "or choose another template",
            )
        kept = self._kept(message, text[start:end])
        if end is None:
            following = self._content_span(text, messages, tools, number + 1)
            return Turn(number, start, None, kept, limit=None if following is None else following[0])
        return Turn(number, start, end, kept)

    def _start(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        number: int,
        first: int | None,
    ) -> int | None:
        prompt = self.generation_prompt
        if prompt and first is not None and text.endswith(prompt, 0, first):
            return first
        before = self._or_none(messages[:number], tools, add_generation_prompt=True)
        if before is not None and text.startswith(before):
            return len(before)
        if first is None:
            return None
        behind = self._behind_prompt(text, messages, tools, number, first)
        return first if behind is None else behind

    def _start_of_call(self, text: str, messages: Messages, tools: Tools, number: int) -> int | None:
        """Where a message begins that has calls and no content; None where that cannot be told."""
        if _content(messages[number]):
            return None
        call, *others = messages[number]["tool_calls"]
        named = {**call, "function": {**call["function"], "name": _OPEN + call["function"]["name"]}}
        changed = [*messages[:number], {**messages[number], "tool_calls": [named, *others]}, *messages[number + 1 :]]
        marked = self._or_none(changed, tools)
        if marked is None or marked.count(_OPEN) != 1 or _MARKS.sub("", marked) != text:
            return None
        return self._behind_prompt(text, messages, tools, number, marked.index(_OPEN))

    def _behind_prompt(self, text: str, messages: Messages, tools: Tools, number: int, end: int) -> int | None:
        """The end of the last generation prompt between what the message before says and character `end`."""
        before = self._content_span(text, messages, tools, number - 1)
        if not self.generation_prompt or before is None:
            return None
        place = text.rfind(self.generation_prompt, before[1], end)
        return None if place < 0 else place + len(self.generation_prompt)

    def _content_span(self, text: str, messages: Messages, tools: Tools, number: int) -> tuple[int, int] | None:
        """Characters [start, end) of what a message says; None where there is no such message, or it is not found."""
        if not 0 <= number < len(messages) or not _content(messages[number]):
            return None
        spans = self._positions(text, messages, tools, [number], both=True)
        start, end = (None, 0) if spans is None else spans[0]
        return None if start is None else (start, end)

    def _kept(self, message: Mapping[str, Any], shown: str) -> bool:
        """Whether all that a message says, its thoughts included where the template knows them, is shown, whatever
        white space stands around its parts. Raises for a tool call that is not."""
        for call in message.get("tool_calls") or ():
            name = call["function"]["name"]
            if name not in shown:
                raise DataError(
                    f"the chat template leaves out the assistant's call of {name!r}",
                    hint="choose a template with tools, such as chatml",
                )
        thoughts = message.get("reasoning_content") if self.reads_thoughts else None
        said = [_content(message), thoughts if isinstance(thoughts, str) else ""]
        seen = "".join(shown.split())
        return all("".join(text.split()) in seen for text in said)

    def _or_none(self, messages: Messages, tools: Tools, *, add_generation_prompt: bool = False) -> str | None:
        try:
            return self.text(messages, tools, add_generation_prompt=add_generation_prompt)
        except DataError:
            return None


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) and content.strip() else ""


def _with_marks(content: str, both: bool) -> str:
    """Marks inside the white space around a content, which templates trim."""
    left = len(content) - len(content.lstrip())
    right = len(content.rstrip())
    return f"{content[:left]}{_OPEN if both else ''}{content[left:right]}{_CLOSE}{content[right:]}"


def _positions(marked: str, mark: str) -> list[int]:
    """Where a mark stands, in characters of the text without any mark."""
    return [match.start() - number for number, match in enumerate(_MARKS.finditer(marked)) if match[0] == mark]


def _tool_names(tools: Tools) -> list[str]:
    names = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
    return [name for name in names if isinstance(name, str)]


def _check_order(turns: Sequence[Turn]) -> None:
    for before, after in itertools.pairwise(turn for turn in turns if turn.whole):
        if after.start < (before.end if before.end is not None else before.start):
            raise DataError(
                f"messages {before.message + 1} and {after.message + 1} (assistant) overlap in what the chat template "
                "writes",
                hint="mark what the assistant writes with {% generation %} ... {% endgeneration %} in the template",
            )
