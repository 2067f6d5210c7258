"""Recipes out and in again: whatever can be loaded is written so that it loads equal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.units import Duration
from trainwright.config import Recipe, json_schema, load_recipe, load_recipe_text, to_yaml
from trainwright.config.docs_page import update_page
from trainwright.config.optim_section import OPTIMIZERS, SCHEDULES
from trainwright.config.reference import keys, section_of_key
from trainwright.config.yaml_file import dump_inline, dump_yaml, parse_scalar, read_yaml

words = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ufeff\ufffe\uffff"), min_size=1)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), words
)
tricky = st.sampled_from(
    [
        "1e3",
        "1e-3",
        "yes",
        "on",
        "null",
        "~",
        "",
        "010",
        "12:30",
        "0x1F",
        ".5",
        "1_000",
        "2024-01-01",
        "a: b",
        "# c",
        "- d",
    ],
) | st.sampled_from(
    [
        "def f():\n    return 1\n",
        "tab\there",
        "trailing ",
        "文本\n第二行",
        "&a",
        "*a",
        "!t",
        "%",
        "@x",
        "`",
        "'",
        '"',
        "<<",
        "=",
    ],
)
values = st.recursive(
    st.one_of(scalars, tricky),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
)


@settings(deadline=None)
@given(st.dictionaries(st.one_of(words, tricky.filter(bool)), values, max_size=5))
def test_any_plain_value_survives_yaml(value: dict[str, Any]) -> None:
    document = read_yaml(dump_yaml(value))
    assert document.problems == []
    assert document.value == value


@settings(deadline=None)
@given(values)
def test_one_line_values_survive_too(value: Any) -> None:
    text = dump_inline(value)
    assert "\n" not in text
    assert parse_scalar(text) == value


def test_yaml_reads_numbers_and_words_as_people_mean_them() -> None:
    text = "[1e-3, 1E5, 1_000, 0x10, .5, 3., -2, yes, no, on, 010, 12:30, 2024-01-01, ~, null, true, '1']"
    expected = [
        1e-3,
        1e5,
        1000,
        16,
        0.5,
        3.0,
        -2,
        "yes",
        "no",
        "on",
        "010",
        "12:30",
        "2024-01-01",
        None,
        None,
        True,
        "1",
    ]
    assert read_yaml(f"a: {text}").value["a"] == expected


durations = st.builds(Duration, st.integers(1, 10**6), st.sampled_from(["steps", "tokens", "epochs", "seconds"])).map(
    str
)
ratios = st.floats(0.01, 0.99)
warmups = st.one_of(st.just("auto"), st.just("10 steps"), ratios)


def schedules() -> st.SearchStrategy[Any]:
    def one(name: str) -> st.SearchStrategy[Any]:
        fields: dict[str, st.SearchStrategy[Any]] = {"warmup": warmups}
        own = SCHEDULES[name].model_fields
        for key, value in {
            "min_ratio": ratios,
            "decay": ratios,
            "power": ratios,
            "restarts": st.integers(0, 3),
            "rise_stairs": st.integers(0, 3),
            "step_rate": ratios,
        }.items():
            if key in own:
                fields[key] = value
        if name == "warmup_decay":  # there is no lowest rate without a fall
            fields |= {"decay": st.sampled_from(["linear", "cosine"])}
            return st.fixed_dictionaries({"name": st.just(name), **fields})
        if name == "lr_range_test":
            fields["warmup"] = warmups.filter(lambda warmup: warmup != "auto")
        required = {"name": st.just(name), **({"cycle_steps": st.integers(2, 9)} if name == "cyclical" else {})}
        return st.fixed_dictionaries(required, optional=fields)

    return st.sampled_from(sorted(SCHEDULES)).flatmap(one)


def optimizers() -> st.SearchStrategy[Any]:
    def one(name: str) -> st.SearchStrategy[Any]:
        fields = {
            "lr": st.one_of(st.just("auto"), ratios),
            "schedule": schedules(),
            "clip_norm": st.one_of(st.none(), ratios),
        }
        own = {"betas": st.tuples(ratios, ratios).map(list), "momentum": ratios, "eps": ratios}
        fields |= {key: value for key, value in own.items() if key in OPTIMIZERS[name].model_fields}
        rules = st.lists(st.fixed_dictionaries({"pattern": st.just(r"\.bias$"), "lr_scale": ratios}), max_size=2)
        return st.fixed_dictionaries({"name": st.just(name)}, optional={**fields, "rules": rules})

    return st.sampled_from(sorted(OPTIMIZERS)).flatmap(one)


text_values = words.filter(lambda text: bool(text.strip()))
recipes = st.fixed_dictionaries(
    {
        "model": st.one_of(
            st.fixed_dictionaries(
                {"preset": text_values}, optional={"overrides": st.dictionaries(words, scalars, max_size=2)}
            ),
            st.fixed_dictionaries({"path": text_values}, optional={"init_from_pretrained": st.booleans()}),
            st.just({"hf": "owner/name"}),
            st.fixed_dictionaries({"config": st.just({"family": "llama", "num_layers": 3})}),
        ),
        "data": st.fixed_dictionaries(
            {"source": st.one_of(text_values, st.lists(text_values, min_size=1, max_size=3))},
            optional={
                "validation": st.sampled_from(["auto", "none", {"fraction": 0.1}, {"source": ["甲.txt"]}]),
                "tokenizer": st.sampled_from(
                    ["auto", {"train": "char"}, {"train": "bpe", "vocab_size": "8k"}, {"hf": "gpt2"}]
                ),
                "packing": st.sampled_from(["concat", "best_fit", "pad"]),
            },
        ),
    },
    optional={
        "task": st.sampled_from(["causal_lm", {"name": "causal_lm", "z_loss": 1e-4}]),
        "train": st.one_of(
            st.fixed_dictionaries({"steps": st.integers(1, 10**9)}),
            st.fixed_dictionaries({"tokens": st.one_of(st.just("auto"), st.integers(1, 10**12))}),
            st.fixed_dictionaries({"time": st.sampled_from(["3 min", "1h30m"]), "on_spike": st.just("skip")}),
            st.fixed_dictionaries({"epochs": ratios, "ema": st.just({"decay": 0.99}), "on_nan": st.just("stop")}),
        ),
        "optim": optimizers(),
        "precision": st.sampled_from(["auto", "bf16", "fp32", {"name": "fp16", "loss_scale": 8.0}]),
        "parallel": st.sampled_from(["auto", {"zero": 0}, {"zero": 3, "shard": 2, "gather": "step"}]),
        "memory": st.sampled_from([{"recompute": "full"}, {"recompute": {"every": 3}, "parameters": "host"}]),
        "comm": st.fixed_dictionaries({"wire": st.sampled_from(["auto", "bf16"]), "hang_after": st.just("90 s")}),
        "checkpoint": st.fixed_dictionaries({"every": st.one_of(st.just("never"), durations)}),
        "run": st.fixed_dictionaries(
            {}, optional={"description": text_values, "sample": st.just({"prompts": ["你好\n"]})}
        ),
    },
)


@settings(deadline=None, max_examples=150)
@given(recipes)
def test_a_recipe_survives_yaml_resolved_or_not(given_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(given_recipe)
    assert Recipe.model_validate(read_yaml(to_yaml(recipe)).value) == recipe
    loaded = load_recipe(given_recipe)
    again = load_recipe_text(loaded.to_yaml())
    assert again.recipe == loaded.recipe
    assert again.to_yaml() == to_yaml(loaded.recipe)
    assert set(loaded.provenance) == set(loaded.values())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def test_the_json_schema_is_json_and_closed(schema: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schema)) == schema
    sections = [part for part in [schema, *schema["$defs"].values()] if part.get("type") == "object"]
    assert len(sections) > 20
    assert all(part["additionalProperties"] is False for part in sections)
    assert set(schema["required"]) == {"model", "data"}
    assert schema["$defs"]["CosineSchedule"]["properties"]["name"]["enum"] == ["cosine"]
    assert "name" in schema["$defs"]["SGD"]["required"]
    assert "name" not in schema["$defs"]["AdamW"].get("required", [])


def test_every_key_says_what_it_means() -> None:
    for key in keys():
        assert key.meaning.endswith("."), key
        assert key.accepts, key
        assert not re.search(r"<[^=]|Annotated|typing", key.accepts), key


def test_a_key_of_another_section_is_found_by_its_name() -> None:
    assert section_of_key("clip_norm") == "optim.clip_norm"
    assert section_of_key("name") is None


def test_the_room_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trainwright.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_key_of_the_schema_stands_in_the_docs() -> None:
    path = Path(__file__).resolve().parents[3] / "docs" / "recipes.md"
    page = path.read_text(encoding="utf-8")
    assert update_page(page) == page, "run: python -m trainwright.config.docs_page docs/recipes.md"
    for key in keys():
        assert f"`{key.path}`" in page
