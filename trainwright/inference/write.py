"""Answers for many prompts at once, as ids: what tasks that write are judged by.

Unlike `Generator`, which streams text by a person's options, this takes ids and gives ids, and searches with beams. One
function for native decoders, which run on their own key/value cache, and for transformers models, encoder-decoders too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.base.seeds import derive_seed
from trainwright.inference.batch import eager, last_logits
from trainwright.inference.sampling import draw
from trainwright.inference.writers import as_writer
from trainwright.models import Decoder
from trainwright.models.hugging_face.model import HuggingFaceModel
from trainwright.models.hugging_face.writing import write_with_transformers

__all__ = ["write"]


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    beams: int = 1,
    batch_rows: int = 16,
    vocab_size: int | None = None,
    length_penalty: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The ids that a model writes for each prompt: behind it (decoder), or having read it (encoder-decoder).

    Greedy with temperature 0, else sampled; with `beams` the likeliest of as many continuations by
    log-probability / tokens^length_penalty (as transformers counts it), which cannot be sampled. Greedy and beam
    results do not depend on the other prompts, but for rounding. The model is in evaluation mode meanwhile. Where
    parameters are divided over ranks, all of them call it alike.

    Args:
        prompts: token ids, none of them empty.
        stop_ids: tokens that end a text; the one that did is the last of its ids.
        batch_rows: prompts that are written together (with beams, as many rows each).
        vocab_size: of the tokenizer: words from there on pad the model's vocabulary and are never chosen.

    Raises:
        ModelError: the model does not write, a prompt is empty, or prompt and answer need more positions than it has.
    """
    if not prompts:
        return []
    words = vocab_size or model.config.vocab_size
    _check(model, prompts, max_new_tokens, beams, temperature)
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    # Prompts of similar length together: fewer padded positions.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    each = max(1, batch_rows // beams)
    stops = tuple(dict.fromkeys(int(stop) for stop in stop_ids))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), each):
            chosen = order[first : first + each]
            rows = [list(prompts[index]) for index in chosen]
            if isinstance(model, HuggingFaceModel):
                found = write_with_transformers(
                    model,
                    rows,
                    max_new_tokens=max_new_tokens,
                    stop_ids=stops,
                    temperature=temperature,
                    beams=beams,
                    vocab_size=words,
                    length_penalty=length_penalty,
                    seed=derive_seed(seed, "write", first),
                )
            else:
                with torch.no_grad(), eager():  # not inference mode: gathered parameters live on in training
                    writer = _Native(model, rows, max_new_tokens, stops, words)
                    seeds = [derive_seed(seed, "write", index) for index in chosen]
                    found = writer.beams(beams, length_penalty) if beams > 1 else writer.one_by_one(temperature, seeds)
            for index, ids in zip(chosen, found, strict=True):
                written[index] = ids
    finally:
        model.train(was_training)
    return written


def _check(model: Any, prompts: Sequence[Sequence[int]], new: int, beams: int, temperature: float) -> None:
    as_writer(model)
    if beams < 1 or new < 0 or temperature < 0 or (beams > 1 and temperature > 0):
        raise ModelError(
            f"beams={beams}, max_new_tokens={new}, temperature={temperature} do not go together",
            hint="beams are 1 or more, and search the likeliest text: temperature=0 with beams above 1",
        )
    if not all(prompts):
        raise ModelError("a prompt is empty", hint="begin it with the token that begins a document")
    limit, longest = int(model.config.max_position_embeddings), max(len(prompt) for prompt in prompts)
    needed = longest if model.config.family == "transformers" and model.config.is_encoder_decoder else longest + new - 1
    if needed > limit:
        raise ModelError(
            f"the longest prompt has {longest} tokens and {new} are to be written, but the model has {limit} positions",
            hint="shorten the prompts or the answers, or use a model with more positions",
        )


class _Native:
    """One batch of prompts on a native decoder."""

    def __init__(self, model: Decoder, prompts: list[list[int]], new: int, stops: tuple[int, ...], words: int) -> None:
        self._model, self._new, self._stops, self._words = model, new, stops, words
        self._device = model.embedding.weight.device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        padding = width - torch.tensor([len(prompt) for prompt in prompts])
        self._positions = (torch.arange(width)[None] - padding[:, None]).clamp_min(0).to(self._device)
        real = torch.arange(width + new)[None] >= padding[:, None]
        self._real = None if bool((padding == 0).all()) else real.to(self._device)
        self._cache = model.make_cache(len(prompts), width + new)
        self._ids = ids.to(self._device)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """fp32 logits [rows, words] of what follows."""
        total = self._cache.length + ids.shape[1]
        mask = None if self._real is None else self._real[:, :total]
        hidden = self._model.hidden_states(ids, position_ids=positions, cache=self._cache, key_mask=mask)
        logits = last_logits(self._model, hidden, self._words).float()
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise ModelError(
                "the model gives logits that are not finite; no token can be chosen",
                hint="the weights are damaged or the precision is too low",
            )
        self._positions = positions[:, -1:] + 1
        return logits

    def _take(self, rows: Tensor) -> None:
        """Go on with these rows, each as often as it is named."""
        self._cache.keep_rows(rows)
        self._positions = self._positions[rows]
        self._real = None if self._real is None else self._real[rows]

    def one_by_one(self, temperature: float, seeds: Sequence[int]) -> list[list[int]]:
        """Greedy, or sampled with a stream of random numbers for each prompt."""
        written: list[list[int]] = [[] for _ in seeds]
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        active = list(range(len(seeds)))
        logits = self._logits(self._ids, self._positions)
        for step in range(self._new):
            if temperature > 0:
                uniforms = torch.stack([torch.rand((), dtype=torch.float64, generator=streams[i]) for i in active])
                chosen = draw(logits / temperature, uniforms).tolist()
            else:
                chosen = logits.argmax(-1).tolist()
            for index, token in zip(active, chosen, strict=True):
                written[index].append(token)
            staying = [place for place, token in enumerate(chosen) if token not in self._stops]
            if not staying or step + 1 == self._new:
                break
            if len(staying) < len(active):
                self._take(torch.tensor(staying, device=self._device))
                active = [active[place] for place in staying]
            tokens = torch.tensor([[written[index][-1]] for index in active], device=self._device)
            logits = self._logits(tokens, self._positions)
        return written

    def beams(self, count: int, length_penalty: float) -> list[list[int]]:
        """Beam search: of each prompt the `count` likeliest beginnings go on; ended texts wait, best by mean
        log-probability. A prompt is done when no beginning can come to more than its worst kept text."""
        prompts = self._ids.shape[0]
        scores = torch.full((prompts, count), -torch.inf, device=self._device)
        scores[:, 0] = 0.0
        texts: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(prompts)]
        ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(prompts)]
        logits = self._logits(self._ids, self._positions)
        self._take(torch.arange(prompts, device=self._device).repeat_interleave(count))
        logits = logits.repeat_interleave(count, 0)
        for step in range(1, self._new + 1):
            total = scores[:, :, None] + logits.log_softmax(-1).view(prompts, count, -1)
            # Twice as many as go on: so many may end here, with one stop token; with several, more of them.
            best, places = total.flatten(1).topk(min(total[0].numel(), count * (1 + max(1, len(self._stops)))))
            rows, tokens = [], []
            for prompt in range(prompts):
                going = self._sort_out(
                    texts[prompt], ended[prompt], best[prompt], places[prompt], count, step, length_penalty
                )
                scores[prompt] = torch.tensor([score for score, _, _ in going], device=self._device)
                texts[prompt] = [[*texts[prompt][beam], token] for _, beam, token in going]
                rows += [prompt * count + beam for _, beam, _ in going]
                tokens += [token for _, _, token in going]
            # transformers' default (early_stopping=False): no beginning is better now than the worst kept text.
            done = [
                len(ended[p]) == count and ended[p][-1][0] >= float(scores[p].max()) / step**length_penalty
                for p in range(prompts)
            ]
            if step == self._new or all(done):
                break
            self._take(torch.tensor(rows, device=self._device))
            logits = self._logits(torch.tensor(tokens, device=self._device)[:, None], self._positions)
        for prompt in range(prompts):
            unfinished = zip(scores[prompt].tolist(), texts[prompt], strict=True)
            ended[prompt] += [(score / len(text) ** length_penalty, text) for score, text in unfinished if text]
        return [max(found, key=lambda pair: pair[0])[1] for found in ended]

    def _sort_out(
        self,
        texts: list[list[int]],
        ended: list[tuple[float, list[int]]],
        best: Tensor,
        places: Tensor,
        count: int,
        step: int,
        length_penalty: float,
    ) -> list[tuple[float, int, int]]:
        """Of the likeliest continuations of one prompt: those that end go to `ended`, which keeps the best `count`;
        returns (score, beam, token) of those that go on."""
        going: list[tuple[float, int, int]] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            beam, token = divmod(place, self._words)
            if token in self._stops:
                if rank < count:  # one that would not have gone on may not end either
                    ended.append((score / step**length_penalty, [*texts[beam], token]))
            elif len(going) < count:
                going.append((score, beam, token))
        ended.sort(key=lambda pair: -pair[0])
        del ended[count:]
        return going
