"""A batch of requests of different lengths on one model: left padding, one key/value cache, one token per step.

Rows end on their own and leave the batch, so that the rest goes on faster. When a row's context is full it is cut to
its newer half and the cache is filled anew: positions stay inside the range that the model was trained on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.inference.request import Request
from trainwright.inference.sampling import draw, filter_logits
from trainwright.inference.writers import Writer
from trainwright.models.hugging_face.model import HuggingFaceModel

__all__ = ["Batch", "eager", "last_logits"]


def eager() -> contextlib.AbstractContextManager[object]:
    """Run compiled blocks uncompiled: with a growing cache every step has a new shape, and each would be compiled anew.

    Where the compiler was never loaded nothing is compiled, and loading it would take a second or two.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def last_logits(model: Writer, hidden: Tensor, words: int) -> Tensor:
    """Logits [B, words] of what follows hidden states [B, T, D]; the rest of the vocabulary is left out."""
    if isinstance(model, HuggingFaceModel):
        return model.logits(hidden[:, -1])[:, :words]
    return F.linear(hidden[:, -1], model.head_weight[:words])


class Batch:
    """Requests that are generated together.

    limit: positions the model has (its context length in tokens).
    vocab_size: of the tokenizer; ids from there on pad the model's embedding and are never chosen.
    """

    def __init__(self, model: Writer, requests: Sequence[Request], *, limit: int, vocab_size: int) -> None:
        self._model = model
        self._device = model.embedding.weight.device
        self._limit = limit
        self._vocab_size = vocab_size
        self.active = [request for request in requests if request.finish_reason is None]
        self._cache: Any = None
        self._positions = torch.empty(0)
        self._key_mask: Tensor | None = None
        self._seen: Tensor | None = None

    def step(self) -> list[tuple[Request, str]]:
        """Generate one token for every active row; returns each row's newly certain text. Finished rows leave."""
        pieces = self._make_room()
        self._leave()
        if not self.active:
            return pieces
        with torch.inference_mode(), eager():
            logits = self._prefill() if self._cache is None else self._decode()
            tokens = self._choose(logits)
            self._mark_seen(tokens)
        pieces += [(row, row.accept(token)) for row, token in zip(self.active, tokens, strict=True)]
        self._leave()
        return pieces

    def _make_room(self) -> list[tuple[Request, str]]:
        """Cut rows whose context is full, dropping the cache if there were any; returns what ended for want of room."""
        ended = []
        for row in self.active:
            if len(row.context) <= self._limit:
                continue
            if row.options.overflow == "stop":
                ended.append((row, row.finish("context")))
                continue
            row.context = row.context[-max(1, self._limit // 2) :]
            self._cache = None
        return ended

    def _leave(self) -> None:
        staying = [index for index, row in enumerate(self.active) if row.finish_reason is None]
        if len(staying) == len(self.active):
            return
        self.active = [self.active[index] for index in staying]
        rows = torch.tensor(staying, dtype=torch.long, device=self._device)
        if self._seen is not None:
            self._seen = self._seen[rows]
        if self._cache is not None and staying:
            self._cache.keep_rows(rows)
            self._positions = self._positions[rows]
            self._key_mask = None if self._key_mask is None else self._key_mask[rows]

    def _prefill(self) -> Tensor:
        """Run all contexts through the model; returns the logits after the last token, [rows, V]."""
        lengths = [len(row.context) for row in self.active]
        width = max(lengths)
        steps = max(
            min(row.remaining, self._limit - length + 1) for row, length in zip(self.active, lengths, strict=True)
        )
        capacity = width + steps
        input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
        for index, row in enumerate(self.active):
            input_ids[index, width - lengths[index] :] = torch.tensor(row.context)
        padding = width - torch.tensor(lengths)
        positions = (torch.arange(width)[None] - padding[:, None]).clamp_min(0).to(self._device)
        self._key_mask = None
        if min(lengths) < width:
            self._key_mask = (torch.arange(capacity)[None] >= padding[:, None]).to(self._device)
        self._cache = self._model.make_cache(len(lengths), capacity)
        self._positions = positions[:, -1:]
        self._begin_seen()
        return self._forward(input_ids.to(self._device), positions)

    def _decode(self) -> Tensor:
        """Run the newest token of each row; returns [rows, V]."""
        newest = torch.tensor([[row.context[-1]] for row in self.active], device=self._device)
        self._positions = self._positions + 1
        return self._forward(newest, self._positions)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        assert self._cache is not None
        total = self._cache.length + input_ids.shape[1]
        key_mask = None if self._key_mask is None else self._key_mask[:, :total]
        hidden = self._model.hidden_states(input_ids, position_ids=positions, cache=self._cache, key_mask=key_mask)
        logits = last_logits(self._model, hidden, self._vocab_size)
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise ModelError(
                "the model gives logits that are not finite; no token can be chosen",
                hint="the weights are damaged or the precision is too low: try dtype float32",
            )
        return logits

    def _choose(self, logits: Tensor) -> list[int]:
        """Rows with equal options are filtered together; each draws from its own stream."""
        chosen = torch.empty(len(self.active), dtype=torch.long)
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, row in enumerate(self.active):
            o = row.options
            key = (o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty)
            groups.setdefault(key, []).append(index)
        for members in groups.values():
            rows = torch.tensor(members, device=self._device)
            options = self.active[members[0]].options
            filtered = filter_logits(
                logits[rows], options, None if self._seen is None else self._seen[rows, : self._vocab_size]
            )
            if options.temperature == 0.0:
                tokens = filtered.argmax(dim=-1)
            else:
                tokens = draw(filtered, torch.tensor([self.active[i].uniform() for i in members], dtype=torch.float64))
            chosen[members] = tokens.cpu()
        return chosen.tolist()

    def _begin_seen(self) -> None:
        """Which tokens each row holds, kept only where a repetition penalty asks for it."""
        if all(row.options.repetition_penalty == 1.0 for row in self.active):
            return
        seen = torch.zeros(len(self.active), self._model.config.vocab_size, dtype=torch.bool)
        for index, row in enumerate(self.active):
            seen[index, [*row.prompt, *row.new_ids]] = True
        self._seen = seen.to(self._device)

    def _mark_seen(self, tokens: list[int]) -> None:
        if self._seen is not None:
            self._seen[torch.arange(len(tokens)), torch.tensor(tokens)] = True
