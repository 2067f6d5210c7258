"""A conversation with a model, rendered by the model's own chat template."""

from __future__ import annotations

from collections.abc import Generator as PythonGenerator
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.inference.generate import Generator
from trainwright.inference.options import Generation, GenerationOptions

__all__ = ["ChatSession"]

_PROBE = "\u2063probe\u2063"  # an invisible separator: no template writes it


class ChatSession:
    """Keeps the messages, asks the model for the next one, and ends it where the template says a turn ends.

    When the conversation outgrows the context, the oldest turns are left out of what the model sees (never the system
    message); `messages` keeps them and `forgotten` counts them.
    """

    def __init__(
        self, generator: Generator, *, system: str | None = None, options: GenerationOptions | None = None
    ) -> None:
        self.generator = generator
        self.options = options or generator.defaults
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._system)
        self.forgotten = 0

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self.messages = list(self._system)
        self.forgotten = 0

    def say(self, text: str) -> Generation:
        """Send a message and wait for the whole answer."""
        stream = self.stream(text)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: Generation = end.value
                return result

    def stream(self, text: str) -> PythonGenerator[str, None, Generation]:
        """Send a message and yield the answer as it is written. Both are kept once the answer is complete.

        Raises:
            ModelError: this message alone does not fit the model's context.
            DataError: the template refuses the messages.
        """
        message = {"role": "user", "content": text}
        options = self._options()
        prompt, forgotten = self._fit([*self.messages, message], options)
        parts = []
        stream = self.generator.stream(prompt, options)
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                result: Generation = end.value
                break
            parts.append(piece)
            yield piece
        self.forgotten = forgotten
        self.messages += [message, {"role": "assistant", "content": "".join(parts)}]
        return result

    def _options(self) -> GenerationOptions:
        """The session's options with the end of a turn added, as a token where it is one, else as a stop string."""
        tokenizer, options = self.generator.tokenizer, self.options
        probe = [*self._system, {"role": "user", "content": "."}, {"role": "assistant", "content": _PROBE}]
        turn_end = tokenizer.render_chat(probe).rpartition(_PROBE)[2].strip()
        options = options.replace(overflow="stop", add_special=False)
        if not turn_end:
            return options
        ids = tokenizer.encode(turn_end)
        if len(ids) == 1:
            eos = options.eos_ids if options.eos_ids is not None else tuple(self.generator.eos_ids(options))
            return options.replace(eos_ids=(*eos, ids[0]))
        return options.replace(stop=(*options.stop, turn_end))

    def _fit(self, messages: list[dict[str, Any]], options: GenerationOptions) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest messages had to be left out for it to fit."""
        tokenizer, limit = self.generator.tokenizer, self.generator.context_length
        room = limit - min(options.max_new_tokens, limit // 2)
        turns = messages[len(self._system) :]
        # Turns come in pairs: a conversation that is cut begins with the user again.
        for dropped in range(0, len(turns), 2):
            shown = [*self._system, *turns[dropped:]]
            text = tokenizer.render_chat(shown, add_generation_prompt=True)
            ids = tokenizer.encode(text)
            if len(ids) <= room:
                return ids, dropped
        raise ModelError(
            f"this message needs {len(ids)} tokens, but the model's context of {limit} leaves {room} beside the answer",
            hint="write a shorter message, or a shorter system message",
        )
