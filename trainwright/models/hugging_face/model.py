"""A module of transformers that offers what native families offer: it keeps its class, its names and its code.

`HuggingFaceModel` is mixed into the class of transformers when a model is built, so that parameter names, tensor plans
and `generate` stay what they are there. Task and trainer see hidden states, chunked losses and scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.base.errors import ModelError
from trainwright.models.hugging_face.arguments import Arguments
from trainwright.models.hugging_face.cache import HuggingFaceCache
from trainwright.models.hugging_face.head import Reached, Tail, projection_loss, standing_in, tail_of
from trainwright.models.hugging_face.heads import named_scores
from trainwright.models.hugging_face.proofs import prove_tail
from trainwright.models.hugging_face.tables import KeptTables
from trainwright.ops.labelled_rows import labelled_rows
from trainwright.ops.linear_cross_entropy import LossSums

__all__ = ["HuggingFaceModel"]

_BACKENDS = {"auto": None, "sdpa": "sdpa", "reference": "eager"}


class HuggingFaceModel(Arguments, KeptTables):
    """What is mixed into a class of transformers.

    Attributes:
        config: a HuggingFaceConfig, which answers for transformers' own fields too.
    """

    config: Any
    forward: Callable[..., Any]

    # --- places ---

    @property
    def theirs(self) -> Any:
        """This model as transformers knows it."""
        return self

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding [V, D]."""
        found: nn.Embedding = self.theirs.get_input_embeddings()
        return found

    @property
    def output_projection(self) -> nn.Module | None:
        """The module that makes logits; None where the model has none, or another process holds it."""
        name = self.__dict__.get("projection_name")
        return None if name is None else self.get_submodule(name)

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, D]."""
        weight = getattr(self.output_projection, "weight", None)
        assert isinstance(weight, Tensor), "a model with an output projection"
        return weight

    # --- forward passes ---

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_key_mask: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
    ) -> Tensor:
        """What the output projection is given, [B, T, D]; of a bare trunk its last hidden states.

        Args:
            position_ids: read where document_ids are given too, or no key_mask; else the model counts itself.
            decoder_input_ids, decoder_key_mask: [B, U] of encoder-decoders, whose result is [B, U, D].
            cache: of `make_cache`; appended to, then attended to; key_mask is then of cached and new tokens.

        Raises:
            ModelError: the model cannot keep documents of one row apart, or its logits are not what its projection
                makes of these.
        """
        if not self.__dict__.get("_proven"):
            self.__dict__["_proven"] = True
            prove_tail(self)
        named = self.named_inputs(input_ids, position_ids, document_ids, key_mask, token_type_ids)
        if cache is not None:
            return self._with_cache(named, cache, position_ids)
        if decoder_input_ids is not None:
            named["decoder_input_ids"] = decoder_input_ids
            if decoder_key_mask is not None:
                named["decoder_attention_mask"] = decoder_key_mask.long()
        elif self.config.class_kind == "seq2seq":
            raise ModelError(
                f"{type(self).__name__} reads a text and writes another: this task gives it only one",
                hint="use a task that writes (translation, summarization, dialogue), or a decoder-only model",
            )
        return self.until_projection(named)

    def hidden_states_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`hidden_states` of a batch's own entries."""
        return self.hidden_states(
            batch["input_ids"],
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
            key_mask=self.key_mask_of(batch),
            token_type_ids=batch.get("token_type_ids"),
            decoder_input_ids=batch.get("decoder_input_ids"),
            decoder_key_mask=batch.get("decoder_key_mask"),
        )

    def head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> LossSums:
        """Loss sums of the model's logits for hidden [N, D] against labels [N] (-100: not trained)."""
        projection = self.output_projection
        if projection is None:
            raise ModelError(f"{type(self).__name__} has no output projection, so it gives no words")
        # The others cost as much. Counting them waits for a device, which only few labels are worth; and ranks that
        # divide the projection go through its chunks together.
        whole = not isinstance(getattr(projection, "weight", None), DTensor)
        if self.config.kind == "masked_lm" or (whole and labels.device.type == "cpu"):
            hidden, labels = labelled_rows(hidden, labels)
        return projection_loss(
            self,
            projection,
            self.tail,
            hidden,
            labels,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=compiled,
        )

    @property
    def task_head(self) -> nn.Module | None:
        """The module of the task's head (with `crf` where it has transitions); None for a language-model head."""
        if self.config.head is None:
            return None
        own = self._modules.get("task_head_")
        return own if own is not None else self.output_projection

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the task's head says of a batch, fp32: "sequence" and "entities" [B, L], "token" [B, T, L], "span"
        [B, T, 2], "embedding" [B, D].

        Raises:
            ModelError: the model has no such head.
        """
        return self.head_scores(self.hidden_states_of(batch), batch)

    def head_scores(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """`scores` from what the head is given."""
        if self.config.head is None:
            raise ModelError(
                f"{type(self).__name__} has a language-model head, which gives no scores",
                hint="attach_head(model, HeadSpec(...)) puts a task's head in its place",
            )
        if self.output_projection is not None:
            return named_scores(self, hidden, batch)
        assert self.task_head is not None
        scores: Tensor = self.task_head(hidden, batch)
        return scores

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [..., V] for hidden states [..., D]."""
        projection = self.output_projection
        assert projection is not None, "a model with an output projection"
        return self.tail(projection(hidden), self)

    @property
    def tail(self) -> Tail:
        """What happens behind the projection."""
        known: Tail | None = self.__dict__.get("_tail")
        if known is None:
            known = self.__dict__["_tail"] = tail_of(self.config.hf, self)
        return known

    def until_projection(self, named: dict[str, Any], *, use_cache: bool = False) -> Tensor:
        """What a forward pass with these arguments of transformers' own gives the projection."""
        name = self.__dict__.get("projection_name")
        if name is None:
            output = self.run(named, use_cache=use_cache)
            states = output.last_hidden_state if "last_hidden_state" in output else output[0]
            assert isinstance(states, Tensor)
            return states
        with standing_in(self, name, _stop):
            try:
                self.run(named, use_cache=use_cache)
            except Reached as reached:
                # Classes slice what they give the projection, by default all of it: a view, which FSDP2 warns of.
                base = reached.hidden._base
                return base if base is not None and base.shape == reached.hidden.shape else reached.hidden
        raise ModelError(f"{type(self).__name__} never called its output projection {name}")

    def make_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> HuggingFaceCache:
        """An empty key/value cache; transformers' own takes its memory as it grows.

        Raises:
            ModelError: the architecture keeps something else than keys and values, or is no decoder.
        """
        if "past_key_values" not in self.__dict__["accepted"] or self.config.kind != "causal_lm":
            raise ModelError(
                f"{type(self).__name__} cannot be continued token by token with a key/value cache",
                hint="`trainwright predict` writes with encoder-decoders; other models write by transformers' generate",
            )
        return HuggingFaceCache()

    def _with_cache(self, named: dict[str, Any], cache: HuggingFaceCache, position_ids: Tensor | None) -> Tensor:
        named["past_key_values"] = cache.inner
        if position_ids is not None and "position_ids" in self.__dict__["accepted"]:
            named["position_ids"] = position_ids.expand(named["input_ids"].shape) + self.__dict__["first_position"]
        hidden = self.until_projection(named, use_cache=True)
        cache.advance(named["input_ids"].shape[1])
        return hidden

    def run(self, named: dict[str, Any], *, use_cache: bool = False) -> Any:
        """The forward pass of transformers."""
        accepted = self.__dict__["accepted"]
        if "use_cache" in accepted:
            named["use_cache"] = use_cache
        # Of the class: who divides the model may have put hooks around the call of the whole, which run already.
        return type(self).forward(self, **named)

    # --- switches ---

    def auxiliary_loss(self, labels: Tensor) -> Tensor | None:
        """None: what a model's own loss adds (of experts, say) is not part of this one."""
        return None

    def set_dropout(self, *, seed: int | None, rows: Tensor | None) -> None:
        """Nothing: its dropouts draw from torch's generator, which the trainer seeds in every step."""

    def set_attention_backend(self, name: str) -> None:
        """Attention as transformers computes it: "sdpa", "reference" (eager), or what it chooses ("auto").

        Raises:
            ModelError: it has no such attention.
        """
        if name not in _BACKENDS:
            raise ModelError(
                f"model.attention {name!r} is for native families",
                hint=f"a transformers model takes {', '.join(_BACKENDS)}",
            )
        wanted = _BACKENDS[name]
        if wanted is not None:
            with self.as_transformers():
                self.theirs.set_attn_implementation(wanted)

    @contextlib.contextmanager
    def as_transformers(self) -> Iterator[None]:
        """Inside, the model's configuration is transformers' own, which its methods read, copy and write into."""
        ours = self.config
        self.config = self.__dict__["own_config"]
        try:
            yield
        finally:
            self.config = ours


def _stop(hidden: Tensor) -> Tensor:
    raise Reached(hidden)
