"""Every key of a recipe, read from the schema: for docs/recipes.md and for "did you mean" across sections."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainwright.config.fields import Written, plain
from trainwright.config.schema import Recipe
from trainwright.config.section import Section
from trainwright.config.yaml_file import dump_inline

__all__ = ["Key", "keys", "markdown_table", "section_of_key"]


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, what it accepts, its default ("required" when there is none), and what it means.

    `variants` names the forms of its section that have it ("adamw, muon"); "" when all have.
    """

    path: str
    accepts: str
    default: str
    meaning: str
    variants: str = ""


@functools.cache
def keys() -> tuple[Key, ...]:
    """Every key of the schema in its order; keys of section variants are merged where they are the same."""
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    variants_of: dict[str, list[str]] = {}
    for path, name, accepts, default, meaning, siblings in _walk(Recipe, "", ""):
        names = merged.setdefault((path, accepts, default, meaning), [])
        if name not in names:  # a section inside a variant of another one is met once for each
            names.append(name)
        parent = path.rpartition(".")[0]
        variants_of.setdefault(parent, siblings)
    result = []
    for (path, accepts, default, meaning), names in merged.items():
        all_of = variants_of[path.rpartition(".")[0]]
        result.append(Key(path, accepts, default, meaning, "" if set(names) >= set(all_of) else ", ".join(names)))
    # Keys of one section stand together, those of every variant first.
    order = {key.path.rpartition(".")[0]: i for i, key in reversed(list(enumerate(result)))}
    return tuple(sorted(result, key=lambda key: order[key.path.rpartition(".")[0]]))


def _walk(
    section: type[Section], prefix: str, variant: str, siblings: list[str] | None = None
) -> Iterator[tuple[str, str, str, str, str, list[str]]]:
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        inner = list(_sections(info.annotation, info.metadata))
        default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
        yield (
            path,
            variant,
            SHORT.get(path) or _accepts(info.annotation, info.metadata, inner),
            default,
            _sentence(info.description),
            siblings or [variant],
        )
        names = [tag for tag, _ in inner]
        listed = "[]" if "tuple" in str(info.annotation) else ""
        for tag, cls in inner:
            yield from _walk(cls, f"{path}{listed}.", tag, names)


def _parts(annotation: Any, metadata: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """(tag, type or Written) of the alternatives of a field's annotation."""
    written = [item for item in metadata if isinstance(item, Written)]
    tag = next((item.tag.strip("<>") for item in metadata if type(item).__name__ == "Tag"), "")
    if written:
        yield tag, written[0]
        return
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        first, *more = typing.get_args(annotation)
        yield from ((tag or inner_tag, part) for inner_tag, part in _parts(first, more))
    elif origin is dict:
        yield tag, dict
    elif origin is not None:
        for argument in typing.get_args(annotation):
            if argument is not Ellipsis:
                yield from ((inner_tag or tag, part) for inner_tag, part in _parts(argument, ()))
    else:
        yield tag, annotation


def _sections(annotation: Any, metadata: list[Any]) -> Iterator[tuple[str, type[Section]]]:
    for tag, part in _parts(annotation, metadata):
        if isinstance(part, type) and issubclass(part, Section):
            yield tag, part


def _accepts(annotation: Any, metadata: list[Any], sections: list[tuple[str, type[Section]]]) -> str:
    texts = []
    for _, part in _parts(annotation, metadata):
        if isinstance(part, Written):
            texts.append(part.expected)
        elif part is type(None):
            texts.append("null")
        elif part is dict:
            texts.append("keys and values")
    if sections:
        texts.append("a list of sections" if "tuple" in str(annotation) else "a section")
    return " or ".join(dict.fromkeys(texts))


SHORT = {
    "data.source": "text, or a list of texts and sections",
    "data.validation.source": "text, or a list of texts and sections",
    "task": "a name or a section",
    "optim.schedule": "a name or a section",
    "precision": "a name or a section",
    "parallel": "auto or a section",
    "parallel.pipeline": "a number of stages, auto or a section",
    "model.overrides": "a section with any field of the family",
    "model.config": "a section with any field of the family",
    "run.smoke": "a section of dotted keys",
}
"""What the schema's types do not say: short forms and free-form sections."""


def _default(value: Any) -> str:
    if isinstance(value, Section):
        return "its defaults"
    return dump_inline(plain(value))


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


@functools.cache
def _paths_by_name() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys():
        found.setdefault(key.path.rpartition(".")[2], []).append(key.path)
    return found


def section_of_key(name: str) -> str | None:
    """The full path of the key called `name` when exactly one section has it: "lr" -> "optim.lr"."""
    found = sorted(set(_paths_by_name().get(name, ())))
    return found[0] if len(found) == 1 else None


def markdown_table(section: str) -> str:
    """The keys below a top-level section as a Markdown table."""
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key in keys():
        if key.path == section or key.path.startswith(f"{section}."):
            only = f" ({key.variants} only)" if key.variants else ""
            cells = (f"`{key.path}`{only}", key.accepts, f"`{key.default}`", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
