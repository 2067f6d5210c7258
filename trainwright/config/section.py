"""The base of every recipe section: frozen, closed to unknown keys, and able to report all of its problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainwright.base.text import did_you_mean, nearest
from trainwright.config.fields import plain

__all__ = ["Section", "by_name", "problem", "tag_of", "variant_of", "variant_tag"]


class Section(BaseModel):
    """One section of a recipe.

    A subclass states rules between its own fields in `problems` and fields without effect in `without_effect`;
    rules between sections stand in the Recipe. A field whose key is a word of Python has a `_` behind its name
    (`global_` for the key `global`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    elsewhere: ClassVar[dict[str, str]] = {}
    """Keys of sibling variants of this section, and the variants that have them: for the message only."""

    own_keys_first: ClassVar[bool] = False
    """Write the keys of a variant before those that all variants share."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(field, what was expected) for every rule between fields that does not hold; "optim.lr" is one further in."""
        yield from ()

    def without_effect(self) -> Mapping[str, str]:
        """Fields that do nothing beside the other values, and why. Giving one is an error; it is never written out."""
        return {}

    @classmethod
    def raw_problems(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(field, what was expected) for rules that can be seen in the keys alone, other errors or not."""
        yield from ()

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fill in what the given keys imply, before fields are checked."""
        return given

    @model_validator(mode="wrap")
    @classmethod
    def _check_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            if isinstance(data, cls):
                return handler(data)
            raise PydanticCustomError("expected", "expected {expected}.{hint}", {"expected": "a section", "hint": ""})
        data = {f"{key}_" if f"{key}_" in cls.model_fields else key: value for key, value in data.items()}
        found = [problem(field, expected, data.get(field)) for field, expected in cls.raw_problems(data)]
        section = None
        try:
            section = handler(cls.prepare(dict(data)))
        except ValidationError as error:
            found += [cls._explain(details) for details in error.errors()]
        if section is not None and not found:
            idle = section.without_effect()
            found += [
                problem(field, f"no such key here: {why}", data[field])
                for field, why in idle.items()
                if field in data
                and getattr(section, field) != cls.model_fields[field].get_default(call_default_factory=True)
            ]
            found += [problem(field, expected, _seen(data, section, field)) for field, expected in section.problems()]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        assert section is not None
        return section

    @classmethod
    def _explain(cls, details: Any) -> InitErrorDetails:
        """A pydantic error in our words, where it concerns this section; errors of inner sections are done already."""
        kind, location, context = details["type"], details["loc"], details.get("ctx", {})
        if location and isinstance(location[0], str):
            location = (_key(location[0]), *location[1:])
        if kind == "extra_forbidden" and len(location) == 1:
            key = str(location[0])
            names = [_key(name) for name in cls.model_fields]
            if key in cls.elsewhere:
                expected, hint = f"no such key here: it belongs to {cls.elsewhere[key]}", ""
            else:
                expected = f"one of the keys {', '.join(names)}"
                hint = did_you_mean(key, names) or _of_a_variant(key, cls.elsewhere)
            return _details("unknown_key", location, details["input"], expected, hint)
        if kind == "missing":
            return _details("missing", location, details["input"], "a value: this key is required", "")
        if kind in ("expected", "unknown_key"):
            return _details(
                kind, location, details["input"], context.get("expected", details["msg"]), context.get("hint", "")
            )
        return _details("expected", location, details["input"], details["msg"], "")

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values that load back to an equal section: nothing without effect, no empty optional keys."""
        idle = self.without_effect()
        result: dict[str, Any] = {}
        fields = type(self).model_fields
        own = type(self).__annotations__ if self.own_keys_first else {}
        for name in sorted(fields, key=lambda name: name not in own):
            field = fields[name]
            value = getattr(self, name)
            if name in idle or (value is None and field.default is None):
                continue
            result[_key(name)] = _plain(value)
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return plain(value)


def problem(field: str, expected: str, seen: Any) -> InitErrorDetails:
    """An error on one field of a section."""
    return _details("expected", tuple(_key(part) for part in field.split(".")) if field else (), seen, expected, "")


def _key(field: str) -> str:
    """What a field is called where it is written."""
    return field.removesuffix("_")


def _seen(data: Any, section: Any, field: str) -> Any:
    """The value of a field as it was given, or as it is by default."""
    for part in field.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
        section = getattr(section, part, None)
    return section if data is None else data


def _details(kind: str, location: tuple[Any, ...], seen: Any, expected: str, hint: str) -> InitErrorDetails:
    error = PydanticCustomError(kind, "expected {expected}.{hint}", {"expected": expected, "hint": hint})
    return InitErrorDetails(type=error, loc=location, input=seen)


def _of_a_variant(key: str, elsewhere: Mapping[str, str]) -> str:
    close = nearest(key, elsewhere)
    return f" Did you mean {close!r}, which belongs to {elsewhere[close]}?" if close else ""


def variant_tag(name: str) -> str:
    """The tag of one variant of a section. Angle brackets keep it apart from keys when error locations are read."""
    return f"<{name}>"


def variant_of(value: Any, classes: Mapping[str, type[Section]], default: str) -> str | None:
    """The tag for a mapping with a `name`; an unknown name goes to the default variant, which refuses it by name."""
    if isinstance(value, Mapping):
        name = value.get("name", default)
        return variant_tag(name if isinstance(name, str) and name in classes else default)
    return next((variant_tag(name) for name, cls in classes.items() if type(value) is cls), None)


def by_name(value: Any) -> Any:
    """The short form of a section that is one word, its `name`, as a section."""
    return {"name": value} if isinstance(value, str) else value


def tag_of(element: Any) -> bool:
    """Whether an element of an error location is such a tag, and so no part of the key path."""
    return isinstance(element, str) and element.startswith("<") and element.endswith(">")
