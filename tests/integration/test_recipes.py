"""Every shipped recipe runs, shrunk by its own `run.smoke` values, through the command line, from start to text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwright.config import builtin_recipes, load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((REPOSITORY / "recipes").glob("**/*.yaml"))} | {
    name: Path(path) for name, path in builtin_recipes().items()
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_opens_with_its_command_and_what_to_expect(name: str) -> None:
    head = RECIPES[name].read_text(encoding="utf-8").split("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert f"trainwright train {name}" in head or f"trainwright train recipes/{name}.yaml" in head


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_when_shrunk(name: str, tmp_path: Path, trainwright: Callable[..., object]) -> None:
    shrunk = load_recipe(RECIPES[name], [f"run.dir={tmp_path}", f"data.cache={tmp_path / 'cache'}"], smoke=True)
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(shrunk.to_yaml(), encoding="utf-8")
    shutil.copy(REPOSITORY / "README.md", tmp_path / "README.md")
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    done = trainwright("train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / (shrunk.recipe.run.name or name)
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "finished"
    assert info["result"]["validation_loss"] < 20
    assert (folder / "model" / "model.safetensors").stat().st_size > 0
    if shrunk.recipe.task.name == "causal_lm":
        written = trainwright(
            "generate", str(folder), "--prompt", "def ", "--max-new-tokens", "5", "--json", cwd=tmp_path
        )
        assert written.returncode == 0, written.stderr
        assert json.loads(written.stdout)["new_tokens"] <= 5
    else:
        judged = trainwright("eval", str(folder), "--split", "validation", "--limit", "4", "--json", cwd=tmp_path)
        assert judged.returncode == 0, judged.stderr
        assert 0 <= json.loads(judged.stdout)["loss"] < 20
