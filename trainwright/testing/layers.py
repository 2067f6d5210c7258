"""Reads every import of the package with `ast` and names those that break a layer (docs/architecture.md, "Rooms").

A room (a folder of the package) imports only rooms on lower layers: never a sibling, never upward. Imports inside
functions and under TYPE_CHECKING count too: a cycle hidden in a function is still a cycle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOMS", "TORCH_FREE", "Room", "Violation", "broken_layers"]


@dataclass(frozen=True)
class Room:
    """One folder: its layer, and the rooms it may import beside itself."""

    layer: int
    may_import: frozenset[str]


@dataclass(frozen=True)
class Violation:
    """One import that breaks a layer, where it stands and what it breaks."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def _room(layer: int, names: str = "") -> Room:
    return Room(layer, frozenset(names.split()))


# No room imports `testing`: it is for tests.
_LOW = "base config comm ops models data monitor launch optim parallel memory checkpoint planner tasks inference"

ROOMS: dict[str, Room] = {
    "base": _room(0),
    "config": _room(1, "base"),
    "ops": _room(1, "base"),
    "comm": _room(2, "base config"),
    "models": _room(2, "base config ops"),
    "data": _room(2, "base config"),
    "monitor": _room(2, "base config"),
    "launch": _room(2, "base config"),
    "testing": _room(2, "base config"),
    "optim": _room(3, "base config ops comm"),
    "parallel": _room(3, "base config ops comm models"),
    "memory": _room(3, "base config ops models"),
    "checkpoint": _room(3, "base config comm"),
    "planner": _room(4, "base config ops comm models data optim parallel memory"),
    "tasks": _room(4, "base config ops models data"),
    "inference": _room(4, "base config ops comm models data parallel checkpoint"),
    "engine": _room(5, "base config ops comm models optim parallel memory checkpoint planner inference"),
    "trainer": _room(6, f"{_LOW} engine"),
    "rlhf": _room(7, f"{_LOW} engine trainer"),
    "compression": _room(7, f"{_LOW} engine trainer"),
    "tuner": _room(7, f"{_LOW} engine trainer"),
    "cli": _room(8, f"{_LOW} engine trainer rlhf compression tuner"),
}
"""The rooms that exist and those that are planned."""

TORCH_FREE = ("base", "config", "launch", "cli")
"""Rooms that import without torch, so that help and configuration errors come at once."""


def broken_layers(package: Path, rooms: Mapping[str, Room] = ROOMS) -> list[Violation]:
    """Every broken layer below `package` (the folder named as the package is), in order of file and line.

    Modules directly in the package folder stand outside the rooms: they are the doors, and may import any room.
    """
    violations: list[Violation] = []
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package)
        if len(inside.parts) == 1:
            continue
        room = inside.parts[0]
        shown = f"{package.name}/{inside.as_posix()}"
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        except SyntaxError as error:
            violations.append(Violation(shown, error.lineno or 1, f"cannot be read: {error.msg}"))
            continue
        if room not in rooms:
            violations.append(
                Violation(shown, 1, f"{room} is no room of the table in {package.name}/testing/layers.py")
            )
            continue
        module = (package.name, *inside.with_suffix("").parts)
        is_package = inside.name == "__init__.py"
        for line, target in _imports(tree, package.name, module[:-1] if is_package else module, is_package):
            reason = _broken(room, target, rooms)
            if reason:
                violations.append(Violation(shown, line, reason))
        if room in TORCH_FREE:
            violations += [
                Violation(shown, line, f"{room} imports torch when it is imported; do it inside the function")
                for line in _immediate_torch_imports(tree)
            ]
    return violations


def _broken(room: str, target: str, rooms: Mapping[str, Room]) -> str | None:
    if target == room or target in rooms[room].may_import:
        return None
    if target not in rooms:
        return f"{room} imports {target}, which is no room"
    mine, theirs = rooms[room].layer, rooms[target].layer
    direction = "its sibling" if mine == theirs else "upward" if theirs > mine else "past what the table allows:"
    return f"{room} (layer {mine}) imports {direction} {target} (layer {theirs})"


def _imports(tree: ast.AST, package: str, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package's own rooms anywhere in the module, absolute or relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base: list[str] = []
            if node.level:
                up = node.level - (1 if is_package else 0)
                base = list(module[: len(module) - up])
            base += node.module.split(".") if node.module else []
            # `from package import room` names the room as an attribute.
            names = [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]
        else:
            continue
        for parts in names:
            if parts[0] == package and len(parts) > 1 and not parts[1].startswith("__"):
                yield node.lineno, parts[1]


def _immediate_torch_imports(tree: ast.Module) -> Iterator[int]:
    """Lines of torch imports that run when the module is imported: outside functions and TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            yield node.lineno
        pending += ast.iter_child_nodes(node)
