"""One prompt on its way: its tokens, its random stream, its text so far, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainwright.base.seeds import derive_seed
from trainwright.data import Tokenizer
from trainwright.inference.options import FinishReason, Generation, GenerationOptions
from trainwright.inference.stopping import StopScanner

__all__ = ["Request"]


class Request:
    """The state of one generation. Nothing in it depends on the other rows of its batch.

    occurrence: how many equal prompts came before it in the same call; it is part of the seed, so that asking for the
        same prompt four times gives four different samples, whatever else is in the call.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        tokenizer: Tokenizer,
        *,
        eos_ids: frozenset[int],
        context: Sequence[int],
        occurrence: int = 0,
    ) -> None:
        self.prompt = tuple(prompt)
        self.context = list(context)  # what the model is shown: the prompt, cut to fit, then what was generated
        self.options = options
        self.new_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = "length" if options.max_new_tokens == 0 else None
        self._eos_ids = eos_ids
        self._decoder = tokenizer.stream()
        self._scanner = StopScanner(options.stop)
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(derive_seed(options.seed, "generate", occurrence))

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.options.max_new_tokens - len(self.new_ids)

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's stream."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def accept(self, token: int) -> str:
        """Take the next token; returns the text that became certain, and sets `finish_reason` at the end."""
        self.new_ids.append(token)
        self.context.append(token)
        if token in self._eos_ids:
            return self.finish("eos")
        piece = self._scanner.push(self._decoder.push(token))
        self.text += piece
        if self._scanner.found is not None:
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            piece += self.finish("length")
        return piece

    def finish(self, reason: FinishReason) -> str:
        """End here; returns the text that was still held back."""
        piece = self._scanner.push(self._decoder.finish())
        piece += self._scanner.finish()
        self.text += piece
        self.finish_reason = "stop" if self._scanner.found is not None else reason
        return piece

    def result(self) -> Generation:
        """What came of it, once it has ended."""
        assert self.finish_reason is not None, "only a finished request has a result"
        return Generation(self.text, tuple(self.new_ids), len(self.prompt), self.finish_reason)
