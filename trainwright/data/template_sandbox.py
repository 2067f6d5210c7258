"""The Jinja environment in which chat templates run: templates come with downloaded models and are not trusted.

Jinja's immutable sandbox keeps a template away from Python's internals; it does not keep it from running for ever or
from filling the memory. Here every loop step and call is counted, and every operation that can make a long text out of
a short one is checked before it is carried out.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

__all__ = ["MAX_CHARACTERS", "MAX_SECONDS", "MAX_STEPS", "ChatEnvironment", "budget", "check_total"]

MAX_STEPS = 2_000_000  # loop steps and calls; a long conversation with tools takes a few thousand
MAX_SECONDS = 10.0
MAX_CHARACTERS = 20_000_000  # of one text; a million-token conversation has about 5 million
MAX_TOTAL = 1_000_000_000  # characters of all texts made on the way, so that many long ones cannot be hoarded
_MAX_NUMBER = 1_000_000  # for widths, indents, repetitions: no text needs more
_WIDE_FORMAT = re.compile(r"%[-+ #0]*(?:\*|\d{5,})|%[^a-zA-Z%]*\.(?:\*|\d{5,})|:[^{}]*\d{5,}|:[^{}]*\{")


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"the template runs for more than {MAX_STEPS:,} steps")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise SecurityError(f"the template runs for more than {MAX_SECONDS:g} seconds")


_current: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("template_budget", default=None)


@contextlib.contextmanager
def budget() -> Iterator[None]:
    """Give the templates rendered inside this context a fresh budget."""
    token = _current.set(_Budget())
    try:
        yield
    finally:
        _current.reset(token)


def _spend() -> None:
    current = _current.get()
    if current is not None:
        current.spend()


def check_total(length: int) -> None:
    """Raise SecurityError for a text that no conversation needs."""
    if length > MAX_CHARACTERS:
        raise SecurityError(f"the template makes a text of more than {MAX_CHARACTERS:,} characters")


def check_length(length: int) -> None:
    """The same for a text or list made on the way, which also counts towards the sum of all of them."""
    check_total(length)
    current = _current.get()
    if current is not None:
        current.characters += length
        if current.characters > MAX_TOTAL:
            raise SecurityError(f"the template makes texts of more than {MAX_TOTAL:,} characters in all")


class _Counted:
    """An iterable whose steps are counted; it keeps its length, which `loop.length` and `loop.last` ask for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # TypeError where there is none: what Jinja expects

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _spend()
            yield item


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _concatenate(*parts: Any) -> str:
    """Jinja's `~`, with the length checked first."""
    texts = [str(part) for part in parts]
    check_length(sum(map(len, texts)))
    return "".join(texts)


def _join_pieces(pieces: Iterable[str]) -> str:
    """What Jinja joins the output of a block, macro or `{% set %}` with, with the length checked first."""
    texts = list(pieces)
    check_length(sum(map(len, texts)))
    return "".join(texts)


def _check_arguments(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise SecurityError(f"the template passes the number {value:,.0f}; the limit is {_MAX_NUMBER:,}")


def _check_growth(name: str, subject: Any, arguments: tuple[Any, ...]) -> None:
    """Refuse calls whose result is far longer than what goes in."""
    if name == "replace" and len(arguments) >= 2 and isinstance(subject, str):
        check_length((len(subject) + 1) * max(_size(arguments[1]), 1))
    elif name == "join" and isinstance(subject, str | list | tuple):
        separator, items = (subject, arguments[0]) if isinstance(subject, str) and arguments else (arguments, subject)
        separator = separator if isinstance(separator, str) else (separator[0] if separator else "")
        check_length(_size(separator) * _size(items) + sum(map(_size, items if _size(items) else ())))
    elif name in ("format", "format_map") and isinstance(subject, str) and _WIDE_FORMAT.search(subject):
        raise SecurityError("the template formats with a width that no conversation needs")
    elif name in ("expandtabs", "indent", "translate", "batch", "wordwrap"):
        number = next((value for value in arguments if isinstance(value, int)), 8)
        check_length(max(_size(subject), 1) * max(abs(number), 1))


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # context or environment comes before the subject

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _spend()
        _check_arguments((*args[passed + 1 :], *kwargs.values()))
        if len(args) > passed:
            _check_growth(name, args[passed], (*args[passed + 1 :], *kwargs.values()))
        result = function(*args, **kwargs)
        check_length(_size(result))
        return result

    return guarded


class _SafeNamespace(Namespace):
    """A namespace that cannot hold names with a leading underscore, the way to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the template names a private attribute {name!r}")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; as text it is just its content, with
    the environment's two marks around it where it has some."""

    tags = {"generation"}  # noqa: RUF012 - the type that Jinja declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = cast("ChatEnvironment", self.environment).generation_marks
        if marks is not None:
            first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
            body = [first, *body, last]
        return nodes.Scope(body).set_lineno(line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of `transformers` chat templates, with limits. Render inside `budget()`.

    Args:
        generation_marks: texts that are written before and after what stands in `{% generation %}` tags.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_join_pieces)

    def __init__(self, generation_marks: tuple[str, str] | None = None) -> None:
        self.generation_marks = generation_marks
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = _guard_filter(name, function)
        # dict and namespace keep Jinja's meaning but show no class to climb from; lipsum makes text from nothing
        self.globals.pop("lipsum", None)
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, then route every loop and every `~` through the checks above."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _call(_Counted, loop.iter)
        _replace_concatenations(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = (_size(left), right) if _size(left) else (_size(right), left)
            if sizes[0] and isinstance(sizes[1], int):
                check_length(sizes[0] * max(sizes[1], 0))
            elif isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
                raise SecurityError("the template computes a number of more than 4096 bits")
        elif operator == "**" and (not isinstance(right, int | float) or abs(right) > 64 or abs(left) > _MAX_NUMBER):
            raise SecurityError("the template raises to a power that no conversation needs")
        elif operator == "+":
            check_length(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("the template formats with a width that no conversation needs")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_growth("format", value.__self__, ())
        return wrapped

    # Jinja's own signature: the names are private so that keyword arguments of a template cannot hit them
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend()
        # what a macro does with a number of a message (a time stamp, say) is checked where it does it
        if __obj is not _Counted and __obj is not _concatenate and not isinstance(__obj, Macro):
            _check_arguments((*args, *kwargs.values()))
            method = getattr(__obj, "__name__", "")
            subject = getattr(__obj, "__self__", None)
            if isinstance(subject, str):
                _check_growth(method, subject, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        check_length(_size(result))
        return result


def _call(function: Callable[..., Any], *arguments: nodes.Node) -> nodes.Node:
    """The AST of a call to one of our own functions, which no template can name."""
    target = nodes.ImportedName(f"{__name__}.{function.__name__}")
    return nodes.Call(target, cast("list[nodes.Expr]", list(arguments)), [], None, None).set_lineno(arguments[0].lineno)


def _replace_concatenations(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Concat):
                    value[index] = _call(_concatenate, *item.nodes)
        elif isinstance(value, nodes.Concat):
            setattr(node, name, _call(_concatenate, *value.nodes))
    for child in node.iter_child_nodes():
        _replace_concatenations(child)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models are trained on it: Chinese as it is, no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    """How a template says that it cannot render these messages."""
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """The current local time, as many templates write it into the system message."""
    if len(pattern) > 256:
        raise SecurityError("the template formats the time with an overlong pattern")
    return datetime.now().strftime(pattern)
