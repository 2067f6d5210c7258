"""Dropout that is the same on every layout: its modules, and the place that says which tokens they see.

A model holds one `DropoutPlace`. Who trains tells it the seed of the step and the numbers of the rows before each
forward pass (`Decoder.set_dropout`), the forward pass adds the positions, and each module hashes its own number under
them (`ops.dropout`). A place that was told nothing leaves the modules with torch's generator, as `nn.Dropout` has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.base.seeds import derive_seed
from trainwright.ops.dropout import drop, head_keys, keep_mask, site_keys, token_keys

__all__ = ["AttentionDropout", "Dropout", "DropoutPlace", "KeptWeights", "RowDropout", "Sited", "join_place", "pin"]


class DropoutPlace:
    """Which step, rows and tokens the dropouts of one model see at the moment.

    Attributes:
        token_keys: int64 [B, T], one for each token of this forward pass; None while torch's generator is used.
        positions: [T] or [B, T], the positions behind them.
        documents: [B, T], the documents behind them; None where a row is one.
        slice_rank: which slice of the sequence this rank's residual stream holds where it is divided (sequence
            parallel); only looked at where a module gets fewer tokens than there are keys.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.documents: Tensor | None = None
        self.token_keys: Tensor | None = None
        self.awaits_tokens = False
        self.slice_rank = 0

    def set(self, seed: int | None, rows: Tensor | None) -> None:
        """For the coming forward pass: the seed of the step and the numbers [B] of its rows in the global batch.

        None for both goes back to torch's generator.
        """
        if (seed is None) != (rows is None):
            raise ValueError("the seed of the step and the numbers of the rows come together")
        self.seed, self.rows = seed, rows
        self.awaits_tokens = seed is not None
        self.positions = self.documents = self.token_keys = None

    def locate(self, positions: Tensor, documents: Tensor | None) -> None:
        """The tokens of this forward pass: positions [T] or [B, T], documents [B, T] where they start anew in each."""
        if self.seed is not None and self.rows is not None:
            self.positions, self.documents = positions, documents
            self.token_keys = token_keys(self.seed, self.rows, positions, documents)
            self.awaits_tokens = False

    def part(self, keys: Tensor, tokens: int) -> Tensor:
        """Those of keys [B, T] that belong to the `tokens` tokens which this rank holds of the sequence."""
        if tokens == keys.shape[1]:
            return keys
        return keys[:, self.slice_rank * tokens : (self.slice_rank + 1) * tokens]

    @contextlib.contextmanager
    def as_it_was(self, before: tuple[Tensor | None, Tensor | None]) -> Iterator[None]:
        """Inside, the tokens of an earlier forward pass (`now` of that time): for computing a block of it again."""
        at_present = self.now()
        self.positions, self.token_keys = before
        try:
            yield
        finally:
            self.positions, self.token_keys = at_present

    def now(self) -> tuple[Tensor | None, Tensor | None]:
        """What `as_it_was` takes."""
        return self.positions, self.token_keys


@dataclass(frozen=True)
class KeptWeights:
    """Which attention weights are kept, as a function of head, query and key.

    Attributes:
        p: the probability of dropping one.
        keys: int64 [B, T], of the queries' tokens.
        positions: [T] or [B, T], of the keys' tokens.
        first_head: the number of the first head that is computed here.
    """

    p: float
    keys: Tensor
    positions: Tensor
    first_head: int = 0

    def mask(self, heads: int) -> Tensor:
        """bool [B, heads, T, S]."""
        positions = self.positions if self.positions.dim() == 1 else self.positions[:, None, None, :]
        return keep_mask(head_keys(self.keys, heads, self.first_head), positions, self.p)


class Sited(nn.Module):
    """A dropout, or another chance, that belongs to a place of its model; `p` above 0 switches it on.

    `site` is a tensor, not a number: compiled blocks of equal shape share their code, whatever their layer is.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.place: DropoutPlace | None = None
        self.site: Tensor | None = None

    def keys(self) -> Tensor | None:
        """int64 [B, T] of all tokens at this site; None where torch's generator is to be used."""
        if self.place is None:
            return None
        if self.place.token_keys is None:
            if self.place.awaits_tokens:
                raise RuntimeError(
                    "dropout was told the rows of this forward pass, but not its positions: whoever calls the parts of"
                    " a model himself calls model.dropout_place.locate(position_ids, document_ids) before them"
                )
            return None
        assert self.site is not None
        return site_keys(self.place.token_keys, self.site)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Dropout(Sited):
    """Dropout of activations [B, T, D].

    `first_feature`: the number of the first feature of what comes in, where features are divided over processes.
    """

    first_feature = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keys = self.keys()
        if keys is None:
            return F.dropout(x, self.p)
        assert self.place is not None
        return drop(x, self.place.part(keys, x.shape[1]), self.p, self.first_feature)


class RowDropout(Sited):
    """Dropout of one vector for each row, [B, D]: goes by the key of the row's first token."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keys = self.keys()
        if keys is None:
            return F.dropout(x, self.p)
        return drop(x[:, None], keys[:, :1], self.p)[:, 0]


class AttentionDropout(Sited):
    """Dropout of attention weights: tells `attend` how much, and which where that does not depend on the layout.

    `first_head`: the number of the first head that is computed here, where heads are divided over processes.
    """

    first_head = 0

    @property
    def probability(self) -> float:
        """Of dropping a weight at the moment: 0 outside training."""
        return self.p if self.training else 0.0

    def arguments(self) -> dict[str, Any]:
        """What `attend` gets: `dropout`, and `kept` where which weights are dropped is known."""
        kept = self.kept()
        return {"dropout": self.probability} if kept is None else {"dropout": self.p, "kept": kept}

    def kept(self) -> KeptWeights | None:
        """Which weights of this forward pass are kept; None outside training and for torch's generator."""
        keys = self.keys() if self.probability > 0.0 else None
        if keys is None:
            return None
        assert self.place is not None
        assert self.place.positions is not None
        return KeptWeights(self.p, keys, self.place.positions, self.first_head)


def join_place(model: nn.Module, place: DropoutPlace, device: torch.device | str) -> int:
    """Let every dropout of `model` that drops anything see `place`; returns how many there are.

    A site is the hash of the module's name, which is the same wherever the model is cut.
    """
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, Sited) and module.p > 0.0:
            module.place = place
            module.site = torch.tensor(derive_seed("dropout", name), device=device)
            found += 1
    return found


def pin(block: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context, to be entered as often as wanted, in which the dropouts of `block` see the tokens that they see now.

    For computing the block again after other forward passes have begun, as a pipeline does.
    """
    place = next((m.place for m in block.modules() if isinstance(m, Sited) and m.place is not None), None)
    if place is None:
        return contextlib.nullcontext
    before = place.now()
    return lambda: place.as_it_was(before)
