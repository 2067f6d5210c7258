"""From a file, a name or a dict to a recipe: layers merged, everything checked, the origin of each value known.

Layers, later ones win: defaults, the file (or dict), its own smoke values when asked for, overrides. A key of a group
of which only one may be given (`train.steps` and `train.tokens`) replaces the others of earlier layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainwright.base.errors import ConfigError
from trainwright.config.dump import to_yaml
from trainwright.config.find import builtin_recipes, find_recipe
from trainwright.config.layers import SHORT_FORMS, Layers
from trainwright.config.problems import Problem, config_error, dotted, from_validation
from trainwright.config.provenance import Origin, explain_values, leaves, written_leaves
from trainwright.config.reference import section_of_key
from trainwright.config.rules import apply_rules
from trainwright.config.schema import Recipe
from trainwright.config.yaml_file import YamlProblem, read_yaml

__all__ = ["LoadedRecipe", "load_recipe", "load_recipe_text"]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the checked, frozen values.
        provenance: dotted key -> Origin, one for each value.
        source_path: the file, or None for a dict.
        name: what messages call it: the file's path, the built-in name or "recipe".
    """

    recipe: Recipe
    provenance: Mapping[str, Origin] = field(hash=False)
    source_path: Path | None
    name: str

    def values(self) -> dict[str, Any]:
        """Dotted key -> plain YAML value, in the order of the schema."""
        return {dotted(path): value for path, value in leaves(self.recipe.to_dict())}

    def resolve(self, updates: Mapping[str, tuple[Any, str]]) -> LoadedRecipe:
        """A new recipe with values replaced by what a rule chose.

        Args:
            updates: dotted key -> (plain YAML value, reason). None takes an optional key out.

        Raises:
            ConfigError: a value that the schema refuses.
        """
        layers = Layers(self.recipe.to_dict(), {})
        updates = {_word_key(key, value): (value, reason) for key, (value, reason) in updates.items()}
        for key, (value, reason) in updates.items():
            layers.put(_path(key), value, Origin("rule", reason=reason), exclusive=False)
        recipe = _validate(layers, self.name)
        resolved = {key: Origin("rule", reason=reason) for key, (value, reason) in updates.items()}
        return replace(self, recipe=recipe, provenance=_complete(recipe, {**self.provenance, **resolved}))

    def explain(self) -> str:
        """A table of every value and its origin, for `--print-config`."""
        return explain_values(self.values(), self.provenance)

    def to_yaml(self) -> str:
        """The recipe as YAML that loads back equal, with the reasons of rules as comments."""
        reasons = {key: origin.reason for key, origin in self.provenance.items() if origin.kind == "rule"}
        return to_yaml(self.recipe, reasons)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    smoke: bool = False,
) -> LoadedRecipe:
    """Read, merge and check a recipe.

    Args:
        source: a YAML file, a run folder, the name of a built-in recipe, a dict, or a Recipe.
        overrides: `a.b.c=value` with the value written as in YAML; list items by number (`data.source.0=...`); `~a.b`
            takes a key out.
        smoke: apply the recipe's own `run.smoke` values, which shrink it to seconds.

    Raises:
        ConfigError: lists every problem found, with file and line, key, what was seen and what was expected.
    """
    if isinstance(source, LoadedRecipe):
        if not overrides and not smoke:
            return source
        source = source.recipe
    if isinstance(source, Recipe):
        source = source.to_dict()
    if isinstance(source, Mapping):
        layers = Layers(copy.deepcopy(dict(source)), {(): Origin("dict", "recipe")})
        return _finish(layers, "recipe", None, overrides, smoke, [])
    path = find_recipe(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return load_recipe_text(text, overrides, name=_called(path), source_path=path, smoke=smoke)


def _called(path: Path) -> str:
    """What messages call a recipe file: its path as short as it goes."""
    if path in builtin_recipes().values():
        return f"built-in {path.name}"
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def load_recipe_text(
    text: str,
    overrides: Sequence[str] = (),
    *,
    name: str = "recipe",
    source_path: Path | None = None,
    smoke: bool = False,
) -> LoadedRecipe:
    """`load_recipe` for YAML text. `name` stands before the line numbers in messages."""
    try:
        document = read_yaml(text)
    except YamlProblem as error:
        where = f"{name}:{error.line}" if error.line else name
        raise config_error(name, [Problem(where, dotted(error.path), error.message)]) from None
    if not isinstance(document.value, dict):
        seen = "nothing" if document.value is None else f"a {type(document.value).__name__}"
        expected = "sections such as `model:` and `data:`"
        raise config_error(name, [Problem(f"{name}:1", "", f"seen {seen}, expected {expected}")])
    problems = [Problem(f"{name}:{p.line}", dotted(p.path), p.message) for p in document.problems]
    origins = {path: Origin("file", f"{name}:{line}") for path, line in document.lines.items()}
    return _finish(Layers(document.value, origins), name, source_path, overrides, smoke, problems)


def _finish(
    layers: Layers,
    name: str,
    source_path: Path | None,
    overrides: Sequence[str],
    smoke: bool,
    problems: list[Problem],
) -> LoadedRecipe:
    bare = copy.deepcopy(layers)
    if smoke:
        problems += _apply_smoke(layers)
    for text in overrides:
        problems += layers.override(text)
    recipe = None
    try:
        recipe = _validate(layers, name)
    except _Invalid as error:
        problems += error.problems
    if not smoke and not problems:
        problems += _check_smoke(bare, name)
    if problems or recipe is None:
        raise config_error(name, problems)
    origins = {dotted(path): layers.origin(path) for path in written_leaves(recipe)}
    loaded = LoadedRecipe(recipe, _complete(recipe, origins, layers), source_path, name)
    return apply_rules(loaded)


class _Invalid(ConfigError):
    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__(config_error(name, problems).message)


def _validate(layers: Layers, name: str) -> Recipe:
    try:
        return Recipe.model_validate(layers.value)
    except ValidationError as error:
        problems = from_validation(error, lambda path: layers.where(path) or name, section_of_key)
        raise _Invalid(name, problems) from None


def _apply_smoke(layers: Layers) -> list[Problem]:
    run = layers.value.get("run")
    smoke = run.get("smoke") if isinstance(run, dict) else None
    if not isinstance(smoke, dict):
        return []
    problems: list[Problem] = []
    for key, value in smoke.items():
        place = layers.origin(("run", "smoke", key)).where
        problems += layers.put(_path(key), value, Origin("smoke", f"run.smoke ({place})"))
    return problems


def _check_smoke(layers: Layers, name: str) -> list[Problem]:
    """Problems that the smoke values would bring, so that a typo in them shows on every load."""
    problems = _apply_smoke(layers)
    try:
        _validate(layers, name)
    except _Invalid as error:
        problems += [problem for problem in error.problems if problem.where.startswith("run.smoke")]
    return problems


def _word_key(key: str, value: Any) -> str:
    """The key that a word for a whole section stands for, so that the section's other keys stay as they are."""
    word = SHORT_FORMS.get(_path(key))
    return f"{key}.{word}" if word and isinstance(value, (str, int)) else key


def _path(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _complete(recipe: Recipe, known: Mapping[str, Origin], layers: Layers | None = None) -> dict[str, Origin]:
    """An origin for every value of the recipe: the one known for it or for what it is part of, else "default"."""
    result = {}
    for path, _ in leaves(recipe.to_dict()):
        origin = Origin("default")
        for length in range(len(path), 0, -1):
            if (found := known.get(dotted(path[:length]))) is not None:
                # Inside a free-form field each value has a line of its own.
                origin = layers.origin(path) if layers is not None else found
                break
        result[dotted(path)] = origin
    return result
