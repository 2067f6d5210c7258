"""Where each value of a recipe came from: a default, a line of a file, an override, a smoke value or a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainwright.base.text import align_columns
from trainwright.config.section import Section

__all__ = ["Origin", "OriginKind", "explain_values", "leaves", "written_leaves"]

OriginKind = Literal["default", "file", "override", "smoke", "dict", "rule"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: default, file, override, smoke, dict (given from Python) or rule ("auto" that became a value).
        where: "recipe.yaml:4", "override optim.lr=1e-3"; "" for defaults and rules.
        reason: why a rule chose it; "" otherwise.
    """

    kind: OriginKind
    where: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "rule":
            return f"auto: {self.reason}"
        return self.where or self.kind


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything that is not a section or a list of sections; lists of plain values are one leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and any(isinstance(item, (Mapping, list)) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def written_leaves(section: Section, path: Path = ()) -> Iterator[Path]:
    """Paths of the values that somebody gave, as against defaults."""
    for name in type(section).model_fields:
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for index, item in items:
            inner = (*path, name) if index is None else (*path, name, index)
            if isinstance(item, Section):
                yield from written_leaves(item, inner)
            else:
                yield (*path, name)


def explain_values(values: Mapping[str, Any], provenance: Mapping[str, Origin]) -> str:
    """Every value with where it came from, in straight columns."""
    from trainwright.config.yaml_file import dump_inline

    rows = [(key, dump_inline(value), str(provenance[key])) for key, value in values.items()]
    return "\n".join(align_columns(rows))
