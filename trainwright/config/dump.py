"""From a recipe back to YAML that loads equal."""

from __future__ import annotations

from collections.abc import Mapping

from trainwright.config.problems import dotted
from trainwright.config.provenance import leaves
from trainwright.config.schema import Recipe
from trainwright.config.yaml_file import dump_yaml, read_yaml

__all__ = ["to_yaml"]


def to_yaml(recipe: Recipe, reasons: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML. `reasons` (dotted key -> why) become comments at the end of their lines."""
    values = recipe.to_dict()
    text = dump_yaml(values)
    if not reasons:
        return text
    lines = text.splitlines()
    places = read_yaml(text).lines
    keys = {dotted(path): path for path, _ in leaves(values)}
    for key, reason in reasons.items():
        path = keys.get(key)
        if path is None:
            continue
        line = places[path] - 1
        # A value that goes on on the next line has no end here to put a comment at.
        last = line + 1 == len(lines) or len(lines[line + 1]) - len(lines[line + 1].lstrip()) <= 2 * (len(path) - 1)
        if last and not lines[line].endswith(("|", "|-", "|+", ">", ">-", ">+")):
            lines[line] += f"  # {' '.join(reason.split())}"
    return "\n".join(lines) + "\n"
