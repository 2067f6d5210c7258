"""The "auto" values that follow from the recipe alone; what depends on machine or data is the planner's to choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.config.data_section import TrainCharacters, TrainWordPiece, TrainWords
from trainwright.config.model_section import ModelFromFolder, ModelFromHub

if TYPE_CHECKING:
    from trainwright.config.load import LoadedRecipe

__all__ = ["apply_rules"]


def apply_rules(loaded: LoadedRecipe) -> LoadedRecipe:
    """Settle run.name, data.tokenizer, data.document_mask and data.append_eos where they are left open."""
    updates: dict[str, tuple[Any, str]] = {}
    recipe = loaded.recipe
    if recipe.run.name is None:
        updates["run.name"] = _run_name(loaded)
    if recipe.data.tokenizer == "auto" and not isinstance(recipe.model, (ModelFromFolder, ModelFromHub)):
        # A model folder may bring its own tokenizer, which only a look inside can tell.
        updates["data.tokenizer"] = (
            {"train": "bpe", "vocab_size": 8192},
            "byte-level BPE writes every text; 8192 suits models up to ~100M",
        )
    if recipe.data.document_mask == "auto":
        shared = recipe.data.packing == "best_fit"
        updates["data.document_mask"] = (
            shared,
            "best_fit puts several documents in a row" if shared else f"packing is {recipe.data.packing}",
        )
    if recipe.data.append_eos == "auto":
        why_not = None
        if isinstance(recipe.data.tokenizer, TrainCharacters):
            why_not = "a character tokenizer has no end-of-text token"
        elif recipe.task.name == "masked_lm" or isinstance(recipe.data.tokenizer, TrainWordPiece | TrainWords):
            why_not = "texts end with [SEP], where their task wants it"
        updates["data.append_eos"] = (why_not is None, why_not or "the model learns where texts end")
    return loaded.resolve(updates) if updates else loaded


def _run_name(loaded: LoadedRecipe) -> tuple[str, str]:
    path = loaded.source_path
    if path is None:
        return "run", "the recipe has no file"
    if path.name == "recipe.resolved.yaml":
        return Path(path).resolve().parent.name, "the run that the recipe comes from"
    return path.stem.lstrip(".") or "run", "the recipe's file name"
