"""From a folder of adapters to a plain Hugging Face folder, with the change that merging makes, measured.

What was trained is the base as it was held (in 4 bits, perhaps) with adapters beside it. The merged model is the same
up to the rounding of its weights, unless it is merged into a base other than the one it was trained on: the difference
of logits and the change of the loss say which (transformers#31293, unsloth-zoo#810).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.data import Tokenizer, holds_tokenizer, load_tokenizer
from trainwright.models import Encoder, Pretrained, load_pretrained, save_pretrained
from trainwright.models.adapters import SavedAdapter, load_adapter, merge_adapter
from trainwright.models.adapters.targets import task_head_of
from trainwright.models.importing import read_json

__all__ = ["MAX_ROWS", "MergeReport", "load_adapted", "merge_folder", "text_rows", "tolerance_of"]

MAX_ROWS = 64
"""Rows that are compared."""

COMPARED_BYTES = 256 << 20
"""Logits of the model with adapters that are kept for the comparison, in fp32; of longer rows some positions."""


@dataclass(frozen=True)
class MergeReport:
    """What merging changed, computed in fp32 with the merged weights rounded as they are written.

    Attributes:
        difference: largest absolute difference of a logit (or of a score of the task's head).
        largest: largest absolute logit; tolerance: the largest difference that is accepted.
        before, after: mean loss of the next token on these rows; None for encoders and heads of tasks.
        rows: that were compared.
    """

    difference: float
    largest: float
    tolerance: float
    before: float | None
    after: float | None
    rows: int

    @property
    def accepted(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        text = (
            f"merging changes logits by at most {self.difference:.2e} (the largest is {self.largest:.1f}; accepted up"
            f" to {self.tolerance:.1e})"
        )
        if self.before is not None and self.after is not None:
            text += f" and the loss from {self.before:.5f} to {self.after:.5f}"
        return f"{text} on {self.rows} rows"


def tolerance_of(dtype: torch.dtype, largest: float) -> float:
    """The largest difference of logits that rounding explains: 1e-5 of the largest logit (at least of 1) in fp32; in
    bf16 and fp16, whose weights are rounded to 8 and 11 bits, 2e-2 and 3e-3 of it."""
    share = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    return share * max(1.0, largest)


def load_adapted(
    folder: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | None = None, whole: bool = False
) -> Any:
    """The model of a folder of adapters with them in place, in evaluation mode on the CPU.

    Args:
        base: the folder of the model that they belong to; None takes what they say.
        dtype: of the base; None keeps that of its folder.
        whole: hold the base as its folder has it, also where it was held in 4 bits, or as another float, while the
            adapters were trained.

    Raises:
        ModelError: the base is not there, or the adapters do not fit it.
    """
    saved = SavedAdapter(folder)
    place = Path(base if base is not None else saved.base or "")
    if not (place / "config.json").is_file():
        named = base or saved.base or "adapter_config.json does not name it"
        raise ModelError(
            f"the base of the adapters in {folder} is not there: {named}",
            hint="name the folder of the model that they were trained on (--base)",
        )
    try:
        model = load_pretrained(place, dtype=dtype, config=saved.model_config, seed=0)
    except ModelError as error:
        raise ModelError(
            f"{place} is not the model that the adapters in {folder} stand in: {error.message}",
            hint="name the folder of the model that they were trained on (--base)",
        ) from error
    load_adapter(model, folder, base="as_is" if whole else saved.held)
    return model.eval()


def merge_folder(
    folder: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    into: Literal["trained", "original"] = "trained",
    rows: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> MergeReport:
    """Merge the adapters of a folder into their base and write a Hugging Face folder to `destination`.

    Args:
        base: see `load_adapted`.
        into: "trained": the weights that the adapters were trained on, opened where they were held in 4 bits;
            "original": those of the base's folder, which differ from them by the 4 bits' error (or the rounding to the
            float that they were held in).
        rows: token ids [T] of up to 64 texts on which the change is measured, cut where the model's positions end;
            None draws some at random.
        dtype: of the written weights; None keeps that of the base's folder.
        tolerance: of logits; None is `tolerance_of`.

    Raises:
        ConfigError: `destination` is in use.
        ModelError: see `load_adapted`; or the change exceeds the tolerance. Nothing is written then.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} is in use", hint="name a new folder; nothing is overwritten")
    model = load_adapted(folder, base=base, dtype=torch.float32)
    saved = SavedAdapter(folder)
    place = Path(base if base is not None else saved.base or "")
    written = dtype or Pretrained(place).dtype
    limit = int(model.config.max_position_embeddings)
    batches = [row[None, :limit] for row in (rows or _random_rows(model))[:MAX_ROWS]]
    before = _measure(model, batches)
    if into == "original":
        del model
        model = load_adapted(folder, base=base, dtype=torch.float32, whole=True)
    merge_adapter(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(written))
    after = _measure(model, batches)
    report = _compare(before, after, written, tolerance)
    if not report.accepted:
        raise ModelError(
            f"{report}: too much, nothing is written",
            hint="merge into the weights that were trained on (into: trained), write more precise ones (dtype: fp32),"
            " or accept it with a larger tolerance",
        )
    destination.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer_of(Path(folder), place)
    if tokenizer is not None:  # first: a folder with config.json and weights is complete
        tokenizer.save(destination)
    save_pretrained(model, destination, dtype=written, generation=_generation(saved, place))
    return report


def text_rows(text: Path, folder: str | Path, base: str | Path | None = None, *, length: int = 256) -> list[Tensor]:
    """Token ids [T] of up to 64 lines of a text file, each up to `length` tokens, for `merge_folder`.

    Raises:
        ConfigError: no line has two tokens. ModelError: neither the adapters nor their base have a tokenizer.
    """
    place = base if base is not None else SavedAdapter(folder).base or ""
    tokenizer = _tokenizer_of(Path(folder), Path(place))
    if tokenizer is None:
        raise ModelError(
            f"there is no tokenizer beside the adapters in {folder}, nor in their base", hint="leave --text out"
        )
    try:
        lines = text.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{text} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{text} is not UTF-8: byte {error.start} is {text.read_bytes()[error.start]:#04x}"
        ) from error
    rows = []
    for line in lines:
        ids = tokenizer.encode(line)[:length]
        if len(ids) > 1:
            rows.append(torch.tensor(ids))
        if len(rows) == MAX_ROWS:
            break
    if not rows:
        raise ConfigError(f"{text} has no line of two tokens or more")
    return rows


def _tokenizer_of(adapters: Path, base: Path) -> Tokenizer | None:
    """The tokenizer that lies beside the adapters, else that of the base."""
    for folder in (adapters, adapters.parent / "tokenizer", base):
        if holds_tokenizer(folder):
            return load_tokenizer(str(folder))
    return None


def _generation(saved: SavedAdapter, base: Path) -> dict[str, Any] | None:
    """What ends a text, and else stands in generation_config.json: as it was trained, or else as the base has it."""
    if saved.generation is not None:
        return saved.generation
    path = base / "generation_config.json"
    return read_json(path) if path.is_file() else None


@dataclass(frozen=True)
class _Measured:
    numbers: list[Tensor]
    loss: float | None


@torch.no_grad()
def _measure(model: Any, batches: Sequence[Tensor]) -> _Measured:
    numbers, loss_sum, count = [], 0.0, 0
    for ids in batches:
        batch = _batch(model, ids)
        if task_head_of(model) is not None:
            numbers.append(model.scores(batch).float())
            continue
        hidden = model.hidden_states_of(batch)
        if _predicts_next(model):
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            sums = model.head_loss(hidden.flatten(0, 1), labels.flatten())
            loss_sum, count = loss_sum + float(sums.loss_sum), count + int(sums.count)
        kept = max(1, COMPARED_BYTES // (4 * model.config.vocab_size * len(batches)))
        step = -(-ids.shape[1] // kept)
        numbers.append(model.logits(hidden[:, ::step]).float())
    return _Measured(numbers, loss_sum / count if count else None)


def _predicts_next(model: Any) -> bool:
    """Whether the model's logits at a token are of the next one."""
    return not isinstance(model, Encoder) and getattr(model.config, "kind", "causal_lm") != "masked_lm"


def _batch(model: Any, ids: Tensor) -> dict[str, Tensor]:
    batch = {"input_ids": ids, "key_mask": torch.ones_like(ids, dtype=torch.bool)}
    batch["entity_starts"] = torch.tensor([[0, min(1, ids.shape[1] - 1)]])
    if getattr(model.config, "is_encoder_decoder", False):
        end = model.config.eos_token_id
        if isinstance(end, int) and model.config.head is not None:
            # The heads of T5 and BART read the vector of the last end token.
            batch["input_ids"] = torch.cat((ids[:, :-1], ids.new_tensor([[end]])), dim=1)
        batch |= {"decoder_input_ids": batch["input_ids"], "decoder_key_mask": batch["key_mask"]}
    return batch


def _compare(before: _Measured, after: _Measured, written: torch.dtype, tolerance: float | None) -> MergeReport:
    pairs = list(zip(before.numbers, after.numbers, strict=True))
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return MergeReport(
        difference=max(float((one - other).abs().max()) for one, other in pairs),
        largest=largest,
        tolerance=tolerance_of(written, largest) if tolerance is None else tolerance,
        before=before.loss,
        after=after.loss,
        rows=len(pairs),
    )


def _random_rows(model: Any) -> list[Tensor]:
    length = min(64, int(model.config.max_position_embeddings))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(int(model.config.vocab_size), (length,), generator=generator) for _ in range(16)]
