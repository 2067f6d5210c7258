"""Which tensor of a folder's files each parameter of a transformers model is: by name and shape, read or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.models.head_files import is_head_tensor
from trainwright.models.hugging_face.library import todays_name
from trainwright.models.hugging_face.structure import Structure, structure, trunk_prefix
from trainwright.models.weights import kept_tensors

__all__ = ["match_names"]

_SHOWN = 6
_LEGACY = ((".gamma", ".weight"), (".beta", ".bias"))


def match_names(
    model: Any, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], *, fresh: bool, other_head: bool
) -> tuple[dict[str, str], frozenset[str], tuple[str, ...]]:
    """(name that transformers saves -> name in the files, parameters that no file has, notes for people).

    Args:
        shapes: of the tensors in the files.
        fresh: parameters of the head may be missing.
        other_head: the files may have another head.

    Raises:
        ModelError: names all that do not fit.
    """
    facts = structure(model.config)
    named = {facts.file_names.get(name, name): (name, tuple(t.shape)) for name, t in kept_tensors(model).items()}
    prefix = trunk_prefix(model)
    seen: dict[str, str] = {}
    doubled: dict[str, str] = {}
    unexpected: list[str] = []
    for key in shapes:
        found = _today(facts, key, prefix, named)
        if found is None:
            unexpected.append(key)
        elif found in named:
            seen[found] = key
        else:
            doubled[found] = key
    for alias, key in doubled.items():
        kept = facts.aliases[alias]
        if kept not in seen:
            seen[kept] = key
        elif not torch.equal(read(seen[kept]), read(key)):
            raise ModelError(
                f"config.json ties {alias} to {kept}, but they differ in the files",
                hint="set tie_word_embeddings to false in config.json",
            )
    missing = [name for name in named if name not in seen]
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # tables, which begin as they stay
    state = [name for name in missing if named[name][0] in facts.state or named[name][0] in computed]
    without = [name for name in missing if fresh and _is_of_head(name, prefix, facts) and name not in state]
    missing = [name for name in missing if name not in without and name not in state]
    wrong = [
        f"{name} is {list(shapes[key])}, expected {list(named[name][1])}"
        for name, key in seen.items()
        if shapes[key] != named[name][1]
    ]
    if fresh:  # the same head for other labels starts anew
        others = [text for text in wrong if _is_of_head(text.split(" ")[0], prefix, facts)]
        wrong = [text for text in wrong if text not in others]
        without += [text.split(" ")[0] for text in others]
    unexpected = [key for key in unexpected if not (other_head and key == "final_logits_bias")]
    patterns = [re.compile(p) for p in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unexpected = [key for key in unexpected if not any(pattern.search(key) for pattern in patterns)]
    of_trunk = _trunk_beginning(model, shapes)
    unused = [key for key in unexpected if other_head and (is_head_tensor(key) or not key.startswith(of_trunk))]
    unexpected = [key for key in unexpected if key not in unused]
    _refuse(missing, unexpected, wrong)
    ours = frozenset(named[name][0] for name in (*without, *state))
    return seen, ours, tuple(_notes(without, unused))


def _trunk_beginning(model: Any, shapes: Mapping[str, Any]) -> str:
    """What the tensors of the trunk begin with in these files; empty where nothing tells them from a head's."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return prefix if any(key.startswith(prefix) for key in shapes) else ""


def _today(facts: Structure, key: str, prefix: str, named: Mapping[str, Any]) -> str | None:
    """The name that transformers saves a tensor of a file under, which may be of another release, or of a class with
    another head."""
    names = [key, todays_name(facts.model, key)]
    names += [key.removesuffix(old) + new for old, new in _LEGACY if key.endswith(old)]
    for name in names:
        without_first = name.partition(".")[2]
        for candidate in (name, prefix + name, without_first, prefix + without_first):
            saved = facts.file_names.get(candidate, candidate)
            if saved in named or saved in facts.aliases:
                return saved
    return None


def _is_of_head(name: str, prefix: str, facts: Structure) -> bool:
    if prefix:
        return not name.startswith(prefix) or is_head_tensor(name)
    return is_head_tensor(name) or name in facts.state


def _refuse(missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]) -> None:
    problems = [
        f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ModelError(
            f"the weights do not fit the configuration (tensors): {' | '.join(problems)}",
            hint="config.json and the safetensors files must come from the same model; a folder without the head that"
            " is trained can be trained from (train), not used (generate, predict)",
        )


def _notes(without: Sequence[str], unused: Sequence[str]) -> list[str]:
    notes = []
    for names, text in (
        (without, "no weights for this head, which starts at random"),
        (unused, "a head not used here"),
    ):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            notes.append(f"the folder has {text}: {shown}")
    return notes
