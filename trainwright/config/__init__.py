"""The recipe: schema, YAML and overrides, the origin of each value, validation with every problem at once.

from trainwright.config import load_recipe

loaded = load_recipe("stdlib", ["train.steps=100"])
loaded.recipe.optim.lr, loaded.provenance["optim.lr"]
"""

from trainwright.config.dump import to_yaml
from trainwright.config.find import builtin_recipes, find_recipe
from trainwright.config.load import LoadedRecipe, load_recipe, load_recipe_text
from trainwright.config.provenance import Origin
from trainwright.config.schema import Recipe, json_schema

__all__ = [
    "LoadedRecipe",
    "Origin",
    "Recipe",
    "builtin_recipes",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "load_recipe_text",
    "to_yaml",
]
