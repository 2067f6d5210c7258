"""Text from a model: `Generator` turns prompts into continuations, all at once or piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator as PythonGenerator
from collections.abc import Iterable, Iterator, Sequence

from trainwright.base.errors import ConfigError, ModelError
from trainwright.data import Tokenizer
from trainwright.inference.batch import Batch
from trainwright.inference.options import Generation, GenerationOptions
from trainwright.inference.request import Request
from trainwright.inference.writers import Writer
from trainwright.models import check_vocabulary

__all__ = ["Generator", "Prompt"]

Prompt = str | Sequence[int]


class Generator:
    """A model with its tokenizer, ready to write.

    Args:
        defaults: options for calls that give none (a folder's generation_config.json, say).
        batch_size: prompts that are generated together; memory grows with it, results do not depend on it.

    Raises:
        ModelError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: Writer,
        tokenizer: Tokenizer,
        *,
        defaults: GenerationOptions | None = None,
        batch_size: int = 16,
    ) -> None:
        check_vocabulary(model.config.vocab_size, tokenizer.vocab_size)
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; expected 1 or more")
        self.model = model
        self.tokenizer = tokenizer
        self.defaults = defaults or GenerationOptions()
        self.batch_size = batch_size

    @property
    def context_length(self) -> int:
        """Tokens that the model can look at."""
        return int(self.model.config.max_position_embeddings)

    def generate(
        self,
        prompts: Iterable[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    ) -> list[Generation]:
        """Continue every prompt (text or token ids); results in the order of the prompts.

        options: one for all, or one per prompt. A prompt's result does not depend on the others.

        Raises:
            ConfigError: a single string instead of a list, or as many options as prompts were expected.
            ModelError: a prompt is empty and the tokenizer has no token to begin with; its ids are outside the
                vocabulary; or it does not fit the context and overflow is "error".
        """
        requests = self._requests(prompts, options)
        for start in range(0, len(requests), self.batch_size):
            for _ in self._run(requests[start : start + self.batch_size]):
                pass
        return [request.result() for request in requests]

    def stream(
        self, prompt: Prompt, options: GenerationOptions | None = None
    ) -> PythonGenerator[str, None, Generation]:
        """Yield the continuation of one prompt as it becomes certain; never half a character or part of a stop string.

        The generator's return value (`yield from` gives it) is the finished Generation.
        """
        (request,) = self._requests([prompt], options)
        return self._stream(request)

    def _stream(self, request: Request) -> PythonGenerator[str, None, Generation]:
        for _, piece in self._run([request]):
            if piece:
                yield piece
        return request.result()

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        was_training = self.model.training
        self.model.eval()
        try:
            batch = Batch(self.model, requests, limit=self.context_length, vocab_size=self.tokenizer.vocab_size)
            while batch.active:
                yield from batch.step()
        finally:
            self.model.train(was_training)

    def _requests(
        self, prompts: Iterable[Prompt], options: GenerationOptions | Sequence[GenerationOptions] | None
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise ConfigError("generate() takes a list of prompts, got one string", hint="write generate([prompt])")
        prompts = list(prompts)
        options = options or self.defaults
        each = [options] * len(prompts) if isinstance(options, GenerationOptions) else list(options)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(each)} options; expected one for all, or one each")
        occurrences: Counter[tuple[int, ...]] = Counter()
        requests = []
        for prompt, option in zip(prompts, each, strict=True):
            ids = self._encode(prompt, option)
            request = Request(
                ids,
                option,
                self.tokenizer,
                eos_ids=self.eos_ids(option),
                context=self._fit(ids, option),
                occurrence=occurrences[tuple(ids)],
            )
            occurrences[tuple(ids)] += 1
            requests.append(request)
        return requests

    def _encode(self, prompt: Prompt, options: GenerationOptions) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special=options.add_special)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            if start is None:
                raise ModelError(
                    "the prompt is empty and the tokenizer has no token that begins a document",
                    hint="give a prompt of at least one character",
                )
            ids = [start]
        wrong = [token for token in ids if not 0 <= token < self.model.config.vocab_size]
        if wrong:
            size = self.model.config.vocab_size
            raise ModelError(f"the prompt holds token ids outside the model's vocabulary of {size}: {wrong[:5]}")
        return ids

    def _fit(self, ids: list[int], options: GenerationOptions) -> list[int]:
        limit, wanted = self.context_length, options.max_new_tokens
        if options.overflow == "error" and len(ids) + wanted > limit + 1:
            raise ModelError(
                f"the prompt has {len(ids)} tokens and {wanted} more are wanted, but the model's context holds {limit}",
                hint=f"shorten the prompt, ask for at most {max(0, limit + 1 - len(ids))}, or use overflow='slide'",
            )
        if len(ids) <= limit:
            return ids
        if options.overflow == "stop":
            raise ModelError(
                f"the prompt has {len(ids)} tokens, but the model's context holds {limit}",
                hint="shorten the prompt, or use overflow='slide', which keeps its end",
            )
        return ids[-max(1, limit - min(wanted, limit // 2)) :]

    def eos_ids(self, options: GenerationOptions) -> frozenset[int]:
        """The tokens that end a text under `options`."""
        if options.eos_ids is not None:
            return frozenset(options.eos_ids)
        known = self.model.config.eos_token_id
        ids = known if isinstance(known, tuple) else (known,)
        return frozenset(token for token in (*ids, self.tokenizer.eos_id) if token is not None)
