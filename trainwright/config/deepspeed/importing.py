"""One DeepSpeed configuration on its way into Trainwright's: each key given gets exactly one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic_core import PydanticCustomError

from trainwright.base.text import did_you_mean, nearest
from trainwright.config.deepspeed.tables import (
    TEXT,
    Block,
    Choice,
    Entry,
    Leaf,
    Maps,
    NoEffect,
    NotBuilt,
    Variants,
    entries,
)
from trainwright.config.problems import Problem, show

__all__ = ["Fate", "Import", "Note"]

Fate: TypeAlias = Literal["mapped", "no effect", "default"]

AUTO = '"auto" is for Hugging Face to fill in; outside it DeepSpeed takes its default'


@dataclass(frozen=True)
class Note:
    """What became of one key.

    Attributes:
        key: its path in the configuration that was given.
        fate: "mapped" to a key of Trainwright's, without "effect", or a "default" of DeepSpeed's that was not given.
        text: where it went or why it changes nothing.
    """

    key: str
    fate: Fate
    text: str

    def __str__(self) -> str:
        head = {"mapped": "mapped to ", "no effect": "no effect: ", "default": "not given: "}[self.fate]
        return f"{self.key}: {head}{self.text}"


@dataclass
class Import:
    """The values of the keys that map, and what has been said about every key.

    Attributes:
        name: what messages call the configuration.
        world: ranks that train. state_ranks: of them, those that hold the same part of the model.
            row_ranks: those with rows of their own.
        values: path -> value of each key that maps; a key that is not given is not there.
        result: what becomes the EngineConfig.
        origins: dotted key of Trainwright's -> the DeepSpeed key that it came from.
    """

    name: str
    world: int
    tables: Mapping[str, Entry]
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    types: dict[str, Choice | None] = field(default_factory=dict)
    """Path of a section whose `type` decides its keys -> the choice made; None when there is no type."""
    answered: set[str] = field(default_factory=set)
    state_ranks: int = 0
    row_ranks: int = 0

    def __post_init__(self) -> None:
        self.state_ranks = self.row_ranks = self.world
        self.defaults |= {path: entry.default for path, entry, _ in entries(self.tables) if isinstance(entry, Maps)}

    # Reading: from the configuration to values, notes and problems.

    def read(self, keys: Mapping[str, Entry], given: Mapping[str, Any], path: str = "") -> None:
        """Every key of a section, which is on: refuse, note, or keep its value for conversion."""
        for key, value in given.items():
            entry = keys.get(key)
            if entry is None:
                self._unknown(keys, path, key)
            elif isinstance(entry, Block):
                self._read_block(entry, value, f"{path}{key}")
            elif isinstance(entry, Variants):
                self._read_variants(entry, value, f"{path}{key}")
            else:
                self._read_value(entry, value, f"{path}{key}")

    def _unknown(self, keys: Mapping[str, Entry], path: str, key: str) -> None:
        hint = did_you_mean(key, keys)
        if not hint:
            # Of several keys with one name those that map come last, and stay.
            known_keys = sorted(entries(self.tables), key=lambda item: isinstance(item[1], Maps))
            all_paths = {known.rpartition(".")[2]: known for known, _, _ in known_keys}
            close = key if key in all_paths else nearest(key, all_paths)
            hint = f" Did you mean {all_paths[close]!r}?" if close in all_paths else ""
        if not hint:
            shown = ", ".join(list(keys)[:12]) + (", ..." if len(keys) > 12 else "")
            hint = f" Expected one of {shown}." if path else ""
        self.refuse(f"{path}{key}", f"unknown key.{hint}")

    def _read_value(self, entry: Leaf, value: Any, path: str) -> None:
        if value is None or (value == "auto" and "auto" not in entry.accepts.words and not _takes_auto(entry)):
            default = f": {_short(entry.default)}" if entry.default is not None else ""
            self.note(path, "no effect", f"{AUTO if value == 'auto' else 'null leaves the default'}{default}")
            return
        try:
            value = entry.accepts.validate(value)
        except PydanticCustomError as error:
            context = error.context or {}
            message = f"seen {show(value)}, expected {context.get('expected')}.{context.get('hint', '')}"
            self.refuse(path, message)
            return
        if isinstance(entry, Maps):
            self.values[path] = value
        elif isinstance(entry, NoEffect):
            self.note(path, "no effect", entry.reason)
        elif value in entry.off:
            self.note(path, "no effect", f"{entry.feature}: {show(value)} asks for none of it")
        else:
            instead = f" {entry.instead}" if entry.instead else ""
            self.refuse(path, f"seen {show(value)}: {entry.feature} is not built yet.{instead}")

    def _read_block(self, block: Block, value: Any, path: str) -> None:
        if value is None or value == {}:
            self.note(path, "no effect", "nothing is in it")
        elif not isinstance(value, Mapping):
            self.refuse(path, f"seen {show(value)}, expected a section.")
        elif block.named:
            for name, inner in value.items():
                self._read_block(Block(block.keys), inner, f"{path}.{name}")
        elif not self._is_on(block, value, path):
            self._read_off(block.keys, value, path, f"{path}.{block.switch} is false")
        elif block.feature:
            instead = f" {block.instead}" if block.instead else ""
            self.refuse(path, f"{block.feature} is not built yet.{instead}")
            self._read_off(block.keys, value, path, "")
        else:
            self.read(block.keys, value, f"{path}.")

    def _is_on(self, block: Block, given: Mapping[str, Any], path: str) -> bool:
        if not block.switch:
            return True
        entry = block.keys[block.switch]
        assert not isinstance(entry, (Block, Variants))
        value = given.get(block.switch)
        if value is None or value == "auto":
            return bool(entry.default)
        if not isinstance(value, bool):
            self.refuse(f"{path}.{block.switch}", f"seen {show(value)}, expected true or false.")
        return value is True

    def _read_off(self, keys: Mapping[str, Entry], given: Mapping[str, Any], path: str, reason: str) -> None:
        """The keys of a section that is off (or refused as a whole, without a reason): names are checked all the same.

        A feature that is off keeps what is inside off, whatever its own switches say.
        """
        for key, value in given.items():
            entry = keys.get(key)
            here = f"{path}.{key}"
            if entry is None:
                self._unknown(keys, f"{path}.", key)
            elif isinstance(entry, Block) and isinstance(value, Mapping) and value:
                inside = value.items() if entry.named else [("", value)]
                for name, inner in inside:
                    if isinstance(inner, Mapping):
                        self._read_off(entry.keys, inner, f"{here}.{name}" if name else here, reason)
                    else:
                        self.refuse(f"{here}.{name}", f"seen {show(inner)}, expected a section.")
            elif reason:
                self.note(here, "no effect", AUTO if value == "auto" else reason)

    def _read_variants(self, entry: Variants, value: Any, path: str) -> None:
        if value is None or value == {}:
            self.note(path, "no effect", "nothing is in it")
            return
        if not isinstance(value, Mapping):
            self.refuse(path, f"seen {show(value)}, expected a section with type and params.")
            return
        given = dict(value)
        kind, params = given.pop("type", None), given.pop("params", None)
        self.read({**entry.keys, "type": NoEffect("", TEXT), "params": Block({})}, given, f"{path}.")
        names = {name.casefold(): name for name in entry.choices}
        if kind is None or kind == "auto":
            if "type" in value:
                self.note(f"{path}.type", "no effect", AUTO if kind else "null is no type")
            if params:
                self.note(f"{path}.params", "no effect", f"{path}.type is not given")
            return
        if not isinstance(kind, str) or kind.casefold() not in names:
            hint = did_you_mean(kind, entry.choices) if isinstance(kind, str) else ""
            known = ", ".join(name for name, choice in entry.choices.items() if not choice.feature)
            self.refuse(f"{path}.type", f"seen {show(kind)}, expected one of {known}.{hint}")
            return
        name = names[kind.casefold()]
        choice = entry.choices[name]
        if choice.feature:
            instead = f" {choice.instead}" if choice.instead else ""
            self.refuse(f"{path}.type", f"seen {show(kind)}: {choice.feature} is not built yet.{instead}")
            return
        self.types[path] = choice
        self.values[f"{path}.type"] = name
        block = Block(choice.keys)
        self.defaults |= {
            known: item.default for known, item, _ in entries(choice.keys, f"{path}.params.") if isinstance(item, Maps)
        }
        if params is not None:
            self._read_block(block, params, f"{path}.params")

    # Converting: from values to Trainwright's own keys.

    def has(self, path: str) -> bool:
        """Whether a key that maps was given, by a value and not by "auto"."""
        return path in self.values

    def get(self, path: str) -> Any:
        """The value of a key that maps: as given, else DeepSpeed's default."""
        return self.values.get(path, self.defaults[path])

    def put(self, path: str, target: str, value: Any, because: str = "") -> None:
        """Say that `path` became `target: value`, and remember it. `because` says what the default stands for."""
        node = self.result
        *sections, last = target.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
        self.origins[target] = path
        if self.has(path):
            self.note(path, "mapped", f"{target}: {show(value)}")
        elif because and path not in self.answered:
            self.note(path, "default", f"DeepSpeed's default became {target}: {show(value)}{because}")

    def idle(self, path: str, reason: str) -> None:
        """Say that a key has no effect beside the other values, if it was given."""
        if self.has(path):
            self.note(path, "no effect", reason)

    def refuse(self, path: str, message: str) -> None:
        self.answered.add(path)
        self.problems.append(Problem(self.name, path, message))

    def note(self, path: str, fate: Fate, text: str) -> None:
        self.answered.add(path)
        self.notes.append(Note(path, fate, text))

    def check_answers(self) -> None:
        """A key that maps and that no conversion spoke of would be dropped in silence: that is a bug of ours."""
        silent = set(self.values) - self.answered
        assert not silent, f"no answer for {sorted(silent)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else show(value)


def _takes_auto(entry: Leaf) -> bool:
    return isinstance(entry, NotBuilt) and "auto" in entry.off
