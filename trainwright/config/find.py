"""Which file a recipe's name stands for: a path, a run folder, or a recipe that comes with the package."""

from __future__ import annotations

from pathlib import Path

from trainwright.base.errors import ConfigError
from trainwright.base.text import did_you_mean

__all__ = ["RESOLVED_RECIPE", "builtin_recipes", "find_recipe"]

RESOLVED_RECIPE = "recipe.resolved.yaml"


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The recipe file that `source` means. Files win over built-in names.

    Raises:
        ConfigError: there is no such file, folder or name; says what comes closest.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / RESOLVED_RECIPE).is_file():
            return path / RESOLVED_RECIPE
        raise ConfigError(
            f"{path} is a folder without {RESOLVED_RECIPE}; expected a recipe file, a run folder or a built-in name",
            hint=f"built-in recipes: {', '.join(builtin_recipes())}",
        )
    builtin = builtin_recipes()
    if str(source) in builtin:
        return builtin[str(source)]
    near = [str(other) for other in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    hint = did_you_mean(str(source), [*near, *builtin]).strip()
    raise ConfigError(
        f"there is no recipe {str(source)!r}: no such file, and no built-in recipe of that name",
        hint=f"{hint} Built-in recipes: {', '.join(builtin)}".strip(),
    )
