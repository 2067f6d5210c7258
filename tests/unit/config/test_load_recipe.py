"""Loading: layers, origins, overrides, short forms, and recipes found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.units import Count, Duration
from trainwright.config import (
    ModelFromFolder,
    ModelFromPreset,
    TrainBPE,
    TrainCharacters,
    builtin_recipes,
    find_recipe,
    load_recipe,
    load_recipe_text,
)

SMALL = """\
model: {preset: llama-15m}
data:
  source: 文本/*.txt
train:
  tokens: 20M
  eval_every: 100 steps
optim:
  schedule: cosine
"""


def small() -> dict[str, Any]:
    return {"model": {"preset": "llama-15m"}, "data": {"source": "a.txt"}}


def test_values_are_typed() -> None:
    recipe = load_recipe_text(SMALL).recipe
    assert isinstance(recipe.model, ModelFromPreset)
    assert recipe.train.tokens == Count(20_000_000)
    assert recipe.train.eval_every == Duration(100, "steps")
    assert recipe.optim.schedule.name == "cosine"
    assert recipe.data.source[0].source == "文本/*.txt"
    assert recipe.checkpoint.every == Duration(600, "seconds")


def test_every_value_knows_its_origin() -> None:
    loaded = load_recipe_text(SMALL, ["train.seed=7", "data.source.0.weight=2"], name="small.yaml")
    origins = {key: str(origin) for key, origin in loaded.provenance.items()}
    assert origins["model.preset"] == "small.yaml:1"
    assert origins["data.source.0.source"] == "small.yaml:3"
    assert origins["data.source.0.weight"] == "override data.source.0.weight=2"
    assert origins["train.tokens"] == "small.yaml:5"
    assert origins["optim.schedule.name"] == "small.yaml:8"
    assert origins["optim.schedule.warmup"] == "default"
    assert origins["train.seed"] == "override train.seed=7"
    assert origins["optim.lr"] == "default"
    assert origins["data.append_eos"].startswith("auto: ")
    assert set(origins) == set(loaded.values())


def test_the_table_of_values_is_straight_in_any_script() -> None:
    from trainwright.base.text import display_width

    lines = load_recipe_text(SMALL, ["run.description=一个很小的模型"], name="配方.yaml").explain().splitlines()
    columns = [
        line for line in lines if line.startswith(("model.preset ", "run.description ", "data.source.0.source "))
    ]
    assert len(columns) == 3
    assert (
        len({display_width(line[: line.index("配方.yaml" if "配方" in line else "override")]) for line in columns}) == 1
    )


def test_overrides_win_and_are_read_as_yaml() -> None:
    loaded = load_recipe(small(), ["optim.lr=1e-3", "optim.clip_norm=null", "train.compile=false", "run.name='12'"])
    assert loaded.recipe.optim.lr == 1e-3
    assert loaded.recipe.optim.clip_norm is None
    assert loaded.recipe.train.compile is False
    assert loaded.recipe.run.name == "12"


def test_an_override_reaches_into_short_forms() -> None:
    loaded = load_recipe_text(
        SMALL, ["optim.schedule.min_ratio=0.1", "data.source.0.text_field=content", "task.z_loss=1e-4"]
    )
    assert loaded.recipe.optim.schedule.name == "cosine"
    assert loaded.recipe.optim.schedule.to_dict()["min_ratio"] == 0.1
    assert loaded.recipe.data.source[0].text_field == "content"
    assert loaded.recipe.task.z_loss == 1e-4


def test_options_of_a_word_are_given_on_the_command_line() -> None:
    words = {
        **small(),
        "adapter": "dora",
        "memory": {"recompute": "full"},
        "checkpoint": {"keep_best": True},
        "task": "sft",
    }
    overrides = [
        "adapter.rank=4",
        "adapter.targets=[q_proj]",
        "memory.recompute.every=2",
        "checkpoint.keep_best.metric=loss",
    ]
    recipe = load_recipe(words, overrides).recipe
    assert recipe.adapter is not None
    assert (recipe.adapter.name, recipe.adapter.rank, recipe.adapter.targets) == ("dora", 4, ("q_proj",))
    assert recipe.to_dict()["memory"]["recompute"] == {"every": 2}
    assert recipe.to_dict()["checkpoint"]["keep_best"] == {"metric": "loss"}


def test_an_override_can_add_and_replace_list_items() -> None:
    loaded = load_recipe_text(SMALL, ["data.source.1=b.txt", "data.source.0=c.txt"])
    assert [source.source for source in loaded.recipe.data.source] == ["c.txt", "b.txt"]


def test_a_budget_on_the_command_line_replaces_that_of_the_file() -> None:
    train = load_recipe_text(SMALL, ["train.steps=50"]).recipe.train
    assert (train.steps, train.tokens, train.epochs, train.time) == (50, None, None, None)
    time = load_recipe_text(SMALL, ["train.time=3 min"]).recipe.train.time
    assert time == Duration(180, "seconds")


def test_two_budgets_in_one_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="one budget only"):
        load_recipe_text(SMALL.replace("  tokens: 20M", "  tokens: 20M\n  steps: 3"))


def test_without_a_budget_tokens_are_auto() -> None:
    assert load_recipe(small()).recipe.train.tokens == "auto"


def test_another_model_replaces_the_one_of_the_file() -> None:
    model = load_recipe(small(), ["model.path=some/folder"]).recipe.model
    assert isinstance(model, ModelFromFolder)
    assert model.init_from_pretrained is True


def test_a_key_can_be_taken_out() -> None:
    loaded = load_recipe_text(SMALL, ["~train.tokens", "~optim.schedule"])
    assert loaded.recipe.train.tokens == "auto"
    assert loaded.recipe.optim.schedule.name == "wsd"
    with pytest.raises(ConfigError, match="nothing to take out"):
        load_recipe_text(SMALL, ["~train.steps"])


def test_rules_that_need_no_machine_are_applied() -> None:
    packed = load_recipe(small(), ["data.packing=best_fit", "data.tokenizer={train: char}"])
    assert packed.recipe.data.document_mask is True
    assert packed.recipe.data.append_eos is False
    assert isinstance(packed.recipe.data.tokenizer, TrainCharacters)
    plain = load_recipe(small()).recipe
    assert plain.data.document_mask is False
    assert plain.data.append_eos is True
    assert plain.data.tokenizer == TrainBPE(train="bpe", vocab_size=Count(8192))
    assert load_recipe(small(), ["model={path: m}"]).recipe.data.tokenizer == "auto"


def test_the_run_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "莎士比亚.yaml"
    path.write_text(SMALL, encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded.recipe.run.name == "莎士比亚"
    assert loaded.source_path == path
    assert load_recipe(small()).recipe.run.name == "run"


def test_smoke_values_come_between_the_file_and_overrides() -> None:
    text = SMALL + "run:\n  smoke: {train.steps: 2, train.seed: 3, model.overrides: {num_layers: 1}}\n"
    loaded = load_recipe_text(text, ["train.seed=4"], name="s.yaml", smoke=True)
    assert (loaded.recipe.train.steps, loaded.recipe.train.tokens, loaded.recipe.train.seed) == (2, None, 4)
    assert loaded.recipe.model.to_dict()["overrides"] == {"num_layers": 1}
    assert str(loaded.provenance["train.steps"]) == "run.smoke (s.yaml:10)"
    assert load_recipe_text(text).recipe.train.tokens == 20_000_000


def test_wrong_smoke_values_are_found_on_every_load() -> None:
    text = SMALL + "run:\n  smoke: {train.stepz: 2}\n"
    with pytest.raises(ConfigError, match=r"run\.smoke.*train\.stepz: unknown key.*Did you mean 'steps'"):
        load_recipe_text(text)


def test_resolve_replaces_values_and_remembers_why() -> None:
    loaded = load_recipe_text(SMALL)
    resolved = loaded.resolve(
        {
            "train.tokens": (None, "became steps"),
            "train.steps": (100, "20M / 200k"),
            "optim.lr": (3e-4, "by size"),
            "optim.schedule.warmup": ("5 steps", "5 %"),
        }
    )
    assert (resolved.recipe.train.steps, resolved.recipe.train.tokens) == (100, None)
    assert resolved.recipe.optim.schedule.warmup == Duration(5, "steps")
    assert str(resolved.provenance["optim.lr"]) == "auto: by size"
    assert str(resolved.provenance["train.eval_every"]) == "recipe:6"
    assert loaded.recipe.optim.lr == "auto"
    with pytest.raises(ConfigError, match=r"optim\.lr: seen -1"):
        loaded.resolve({"optim.lr": (-1, "wrong")})


def test_reasons_become_comments_in_the_resolved_recipe() -> None:
    resolved = load_recipe_text(SMALL).resolve({"optim.lr": (3e-4, "by size"), "data.workers": (2, "两个核")})
    text = resolved.to_yaml()
    assert "lr: 0.0003  # by size\n" in text
    assert "workers: 2  # 两个核\n" in text
    assert load_recipe_text(text).recipe == resolved.recipe


def test_built_in_recipes_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "stdlib" in builtin_recipes()
    assert find_recipe("stdlib") == builtin_recipes()["stdlib"]
    (tmp_path / "stdlib").write_text(SMALL, encoding="utf-8")
    assert find_recipe("stdlib") == Path("stdlib")
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(SMALL, encoding="utf-8")
    assert load_recipe(run).recipe.run.name == "first"
    with pytest.raises(ConfigError, match="Did you mean 'stdlib'"):
        find_recipe("stdlibb")
    with pytest.raises(ConfigError, match="folder without"):
        find_recipe(tmp_path)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
@pytest.mark.parametrize("smoke", [False, True])
def test_built_in_recipes_load(name: str, smoke: bool) -> None:
    assert load_recipe(name, smoke=smoke).recipe.run.smoke


def test_a_recipe_can_be_given_in_every_form() -> None:
    loaded = load_recipe(small())
    assert load_recipe(loaded) is loaded
    assert load_recipe(loaded.recipe).recipe == loaded.recipe
    assert load_recipe(loaded, ["train.seed=5"]).recipe.train.seed == 5
    given = small()
    load_recipe(given, ["train.seed=5"])
    assert given == small()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(small()).recipe.train.seed = 3  # type: ignore[misc]
