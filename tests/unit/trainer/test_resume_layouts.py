"""A resume under another layout: what was decided for the old one, or said of a degree that is gone, does not stay."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from trainwright.config import load_recipe
from trainwright.trainer.resume import enter_folder

RECIPE = {"model": {"preset": "llama-15m"}, "data": {"source": "python-stdlib"}, "train": {"steps": 3}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {"tensor": 2},
    "context": {"context": 2, "ulysses": 2},
    "ring": {"context": 4},
    "interleaved": {"pipeline": {"stages": 2, "schedule": "interleaved", "virtual": 3}},
    "cut": {"pipeline": {"stages": 2, "schedule": "1f1b", "cuts": [1]}},
    "zbv": {"pipeline": {"stages": 2, "schedule": "zbv"}},
    "sharded": {"zero": 3, "gather": "step", "accumulate": "local", "shard": 2},
    "replicated": {"zero": 0},
}
WHOLE = {"tensor": 1, "context": 1, "pipeline.stages": 1}
DECIDED = {"context": {"parallel.ulysses": 2}, "ring": {"parallel.ulysses": 2}}


def flat(layout: dict[str, Any]) -> dict[str, Any]:
    inner = {f"pipeline.{key}": value for key, value in layout.get("pipeline", {}).items()}
    return {f"parallel.{key}": value for key, value in {**layout, **inner}.items() if key != "pipeline"}


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_any_layout_follows_any_other(tmp_path: Path, before: str, after: str) -> None:
    first = load_recipe({**RECIPE, "run": {"dir": str(tmp_path), "name": "run"}, "parallel": LAYOUTS[before]})
    with contextlib.ExitStack() as stack:
        entered = enter_folder(first, "never", stack)
        entered.folder.path.joinpath("checkpoints", "step-1").mkdir(parents=True)
        decided = {"train.micro_batch": 24, **DECIDED.get(before, {})}
        settled = first.resolve({key: (value, "a reason") for key, value in decided.items()})
        entered.folder.recipe.write_text(settled.to_yaml(), encoding="utf-8")
        entered.folder.update_info(status="interrupted", ranks=1, given=entered.given)
    wanted = {f"parallel.{key}": value for key, value in WHOLE.items()} | flat(LAYOUTS[after])
    changes = [f"{key}={value}" for key, value in wanted.items()]
    second = load_recipe({**RECIPE, "run": {"dir": str(tmp_path), "name": "run"}}, changes)
    with contextlib.ExitStack() as stack:
        values = enter_folder(second, "auto", stack).loaded.values()
    assert {key: value for key, value in wanted.items() if values.get(key, value) != value} == {}
    if before != after and {before, after} - {"sharded", "replicated", "none"}:
        assert values["train.micro_batch"] == "auto"
