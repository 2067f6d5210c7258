"""YAML in and out: safe, typed as YAML 1.2 people expect, and aware of the line on which each key stands.

Differences from PyYAML's SafeLoader: `1e-3` is a number, `yes`, `on`, `010` and `12:30` are text, dates stay text, a
key that stands twice is refused, and so are tags, merge keys and anchors that would blow a small file up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

__all__ = ["Document", "YamlProblem", "dump_inline", "dump_yaml", "parse_scalar", "read_yaml"]

Path = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000
MAX_NODES = 50_000  # after anchors are expanded: a "billion laughs" file stops here
MAX_DEPTH = 50

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    # PyYAML's own resolvers too: text that either reader could take for something else is quoted.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # "def f():\n" reads better than three lines of single quotes.
    style = '"' if "\n" in text or "\t" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: _Dumper, items: list[Any]) -> SequenceNode:
    flat = not any(isinstance(item, (dict, list)) for item in items)
    short = flat and sum(len(str(item)) + 2 for item in items) < 80
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=short)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)

for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass
class YamlProblem(Exception):
    """What is wrong with a YAML text, and where (1-based line; key path as far as it is known)."""

    message: str
    line: int | None = None
    path: Path = ()


@dataclass
class Document:
    """A YAML text as plain values, with the line of every key and list item, and what was wrong with it."""

    value: Any
    lines: dict[Path, int]
    problems: list[YamlProblem] = field(default_factory=list)


def read_yaml(text: str) -> Document:
    """Parse one document. Duplicate keys and the like are collected; text that is no YAML raises YamlProblem."""
    if len(text) > MAX_CHARACTERS:
        raise YamlProblem(f"seen {len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None, {})
        if node is not None:
            document.value = _Builder(loader, document).build(node, (), ())
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(f"not valid YAML: {what}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        raise YamlProblem(f"not valid YAML: {error.reason} (character {error.character!r})", line) from None
    except RecursionError:
        raise YamlProblem("nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Builder:
    """Turns YAML nodes into values, keeping lines."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self._loader = loader
        self._document = document
        self._nodes = 0

    def _complain(self, message: str, node: Node, path: Path) -> None:
        self._document.problems.append(YamlProblem(message, node.start_mark.line + 1, path))

    def build(self, node: Node, path: Path, above: tuple[int, ...]) -> Any:
        line = node.start_mark.line + 1
        self._document.lines.setdefault(path, line)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise YamlProblem(f"more than {MAX_NODES:,} values once its anchors are expanded", line, path)
        if id(node) in above:
            raise YamlProblem("an anchor that contains itself", line, path)
        if len(above) > MAX_DEPTH:
            raise YamlProblem(f"more than {MAX_DEPTH} levels", line, path)
        above = (*above, id(node))
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            self._complain(f"seen the tag {node.tag!r}; tags are not allowed", node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, i), above) for i, item in enumerate(node.value)]
        assert isinstance(node, MappingNode)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if key is None or key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null") or key == "":
                self._complain("seen a key that is not plain text", key_node, path)
                continue
            inner = (*path, key)
            if key in result:
                first = self._document.lines[inner]
                self._complain(f"seen this key twice, first on line {first}", key_node, inner)
                continue
            self._document.lines[inner] = key_node.start_mark.line + 1
            result[key] = self.build(value_node, inner, above)
        return result

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = node.value
        match kind:
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return _whole(text)
            case "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
        self._complain(f"seen the tag {node.tag!r}; tags are not allowed", node, path)
        return None


def _whole(text: str) -> int | str:
    digits = text.replace("_", "")
    if len(digits) > 40:  # Python refuses to read numbers of more than 4300 digits; none that long means anything here
        return text
    return int(digits, 16) if digits.lstrip("+-").startswith("0x") else int(digits)


def parse_scalar(text: str) -> Any:
    """The value of `key=value` on the command line, read as YAML. Raises YamlProblem."""
    document = read_yaml(text)
    if document.problems:
        raise document.problems[0]
    return document.value


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `read_yaml` reads back equal: keys in their order, short lists inline."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110, indent=2
    )


def dump_inline(value: Any) -> str:
    """One plain value on one line, as it would stand behind `key=`."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**9)
    text = text.removesuffix("\n").removesuffix("\n...").removesuffix("\n")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
