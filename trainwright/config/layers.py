"""Raw values of a recipe before they are checked, the origin of each, and how a later layer changes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trainwright.config.problems import Problem, dotted
from trainwright.config.provenance import Origin
from trainwright.config.yaml_file import YamlProblem, parse_scalar

__all__ = ["EXCLUSIVE", "SHORT_FORMS", "Layers"]

Path = tuple[str | int, ...]

EXCLUSIVE: dict[Path, tuple[str, ...]] = {
    ("train",): ("steps", "tokens", "epochs", "time"),
    ("model",): ("preset", "path", "hf", "config"),
    ("data", "tokenizer"): ("train", "path", "hf"),
    ("data", "validation"): ("fraction", "source"),
}
"""Sections with keys of which only one can be given; a later layer's replaces those of earlier ones."""

SHORT_FORMS: dict[Path, str | None] = {
    ("task",): "name",
    ("adapter",): "name",
    ("optim", "schedule"): "name",
    ("precision",): "name",
    ("parallel",): None,
    ("parallel", "pipeline"): "stages",
    ("memory", "recompute"): None,
    ("checkpoint", "keep_best"): None,
}
"""Sections that may be one word or number, and the key that it stands for (None: the word stands for no key, and
gives way to the keys of the section)."""

_OVERRIDE = re.compile(r"(?P<key>[^=\s]+)=(?P<value>.*)", re.DOTALL)


@dataclass
class Layers:
    """Raw values and their origins. `origins` holds every path that some layer wrote."""

    value: dict[str, Any]
    origins: dict[Path, Origin]

    def origin(self, path: Path) -> Origin:
        """Where the value at `path`, or the nearest section above it, was written."""
        for length in range(len(path), -1, -1):
            if (found := self.origins.get(path[:length])) is not None:
                return found
        return Origin("default")

    def where(self, path: Path) -> str:
        """The place to show for a problem at `path`: where it, or something inside it, or what it is in was written."""
        if path not in self.origins:
            inside = [origin for known, origin in self.origins.items() if known[: len(path)] == path and path]
            if inside:
                return inside[-1].where
        return self.origin(path).where

    def override(self, text: str) -> list[Problem]:
        """Apply one `key=value` or `~key` of the command line."""
        where = f"override {text}"
        if text.startswith("~"):
            return self._remove(_split(text[1:]), where)
        found = _OVERRIDE.fullmatch(text)
        if not found or found["value"] == "":
            return [
                Problem(where, "", "expected key=value, such as optim.lr=3e-4 (null for no value, ~key to take it out)")
            ]
        try:
            value = parse_scalar(found["value"])
        except YamlProblem as error:
            return [Problem(where, found["key"], f"seen {found['value']!r}, {error.message}")]
        return self.put(_split(found["key"]), value, Origin("override", where))

    def put(self, path: Path, value: Any, origin: Origin, *, exclusive: bool = True) -> list[Problem]:
        """Replace the value at `path`. Sections on the way are made; a word for a section is written out first."""
        if exclusive:
            for other in EXCLUSIVE.get(path[:-1], ()):
                if path[-1] in EXCLUSIVE[path[:-1]] and other != path[-1]:
                    self._remove((*path[:-1], other), "", missing_ok=True)
        node: Any = self.value
        for depth, part in enumerate(path[:-1]):
            node = self._enter(node, path, depth, part)
            if node is None:
                seen = dotted(path[: depth + 1])
                return [Problem(origin.where, dotted(path), f"{seen} is not a section with keys below it")]
        last = path[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last > len(node):
                return [Problem(origin.where, dotted(path), f"expected the number of an item, 0 to {len(node)}")]
            node[last : last + 1] = [value]
        elif value is None and origin.kind == "rule":
            node.pop(last, None)
        else:
            node[str(last)] = value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = origin
        return []

    def _enter(self, node: Any, path: Path, depth: int, part: str | int) -> Any:
        """The section or list below `node` at `part`, made or written out if need be; None when there can be none."""
        here = path[: depth + 1]
        if isinstance(node, list):
            if not isinstance(part, int) or part >= len(node):
                return None
            inner = node[part]
            if here[:-1] == ("data", "source") and isinstance(inner, str):
                inner = {"source": inner}
                node[part] = inner
            return inner if isinstance(inner, (dict, list)) else None
        if not isinstance(node, dict):
            return None
        inner = node.get(str(part))
        if isinstance(inner, (str, int)) and here in SHORT_FORMS:
            word = SHORT_FORMS[here]
            inner = {word: inner} if word else {}
        elif here[-1] == "source" and isinstance(inner, (str, dict)) and isinstance(path[depth + 1], int):
            inner = [inner]
        elif inner is None or (isinstance(inner, str) and here in EXCLUSIVE):
            inner = {}
        if not isinstance(inner, (dict, list)):
            return None
        node[str(part)] = inner
        return inner

    def _remove(self, path: Path, where: str, *, missing_ok: bool = False) -> list[Problem]:
        node: Any = self.value
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else node[part] if _item(node, part) else None
        last = path[-1]
        if isinstance(node, dict) and last in node:
            del node[str(last)]
        elif isinstance(node, list) and _item(node, last):
            del node[int(last)]
        elif not missing_ok:
            return [Problem(where, dotted(path), "no such key in the recipe, so there is nothing to take out")]
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        return []


def _item(node: Any, part: str | int) -> bool:
    return isinstance(node, list) and isinstance(part, int) and part < len(node)


def _split(key: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))
