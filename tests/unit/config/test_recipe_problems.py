"""What is wrong with a recipe is said in one go: file and line, key, what was seen, expected and probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import load_recipe, load_recipe_text

BASE = "model: {preset: llama-15m}\ndata: {source: a.txt}\n"


def problems(text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe_text(text, overrides or [], name="r.yaml")
    assert error.value.exit_code == 2
    return str(error.value)


def test_all_problems_are_reported_at_once_with_their_lines() -> None:
    text = """\
model:
  preset: llama-15m
  droput: 0.1
data:
  source: [a.txt, {source: b.txt, weigth: 2}]
  packing: bestfit
  tokenizer: {train: bpe, vocab_size: 100}
train:
  steps: many
  eval_every: 100
optim:
  name: adam
  schedule: {name: cosine, power: 2}
presicion: bf16
"""
    message = problems(text, ["optim.lr=fast", "run.name=a/b"])
    expected = {
        "r.yaml:3": "model.droput: unknown key",
        "r.yaml:5": "data.source.1.weigth: unknown key",
        "r.yaml:6": "data.packing: seen 'bestfit', expected one of concat, best_fit, pad. Did you mean 'best_fit'?",
        "r.yaml:7": "data.tokenizer.vocab_size: seen 100, expected a whole number",
        "r.yaml:9": "train.steps: seen 'many'",
        "r.yaml:10": "train.eval_every: seen 100, expected auto, never or a duration",
        "r.yaml:12": "optim.name: seen 'adam', expected one of adamw",
        "r.yaml:13": "optim.schedule.power: no such key here: it belongs to name: polynomial",
        "r.yaml:14": "presicion: unknown key",
        "override optim.lr=fast": "optim.lr: seen 'fast', expected auto or a number above 0",
        "override run.name=a/b": "run.name: seen 'a/b'",
    }
    assert message.startswith(f"{len(expected)} problems in r.yaml\n")
    for where, what in expected.items():
        line = next(line for line in message.splitlines() if line.strip().startswith(where + " "))
        assert what in line
    assert "Did you mean 'dropout'?" in message
    assert "Did you mean 'precision'?" in message
    assert "Did you mean 'adamw'?" in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.vocab", "vocab_size"),
        ("data.sequence_lenght", "sequence_length"),
        ("train.early_stoping", "early_stopping"),
        ("optim.schedule.warm_up", "warmup"),
        ("optim.schedule.timescal", "timescale"),
        ("checkpoint.evry", "every"),
        ("monitor.log_evry", "log_every"),
        ("run.descripton", "description"),
        ("trian.steps", "train"),
        ("lr", "optim.lr"),
        ("tokenizer", "data.tokenizer"),
    ],
)
def test_typos_are_met_at_every_level(key: str, meant: str) -> None:
    assert f"Did you mean {meant!r}" in problems(BASE, [f"{key}=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.name=sgd", "optim.betas=[0.9, 0.99]"],
            "optim.betas: no such key here: it belongs to name: adamw, lion",
        ),
        (
            ["optim.schedule={name: cosine, decay: 0.1}"],
            "optim.schedule.decay: no such key here: it belongs to name: wsd",
        ),
        (["train.spike={sigma: 4}"], "train.spike: no such key here: train.on_spike is ignore"),
        (["train.on_nan=stop", "train.max_skips=3"], "train.max_skips: no such key here"),
        (["run.sample={prompts: [a], temperature: 0, top_k: 5}"], "run.sample.top_k: no such key here"),
        (["data.tokenizer={train: char, vocab_size: 100}"], "data.tokenizer.vocab_size: no such key here"),
        (["model.init_from_pretrained=false"], "it belongs to model.path and model.hf"),
        (["model={path: a}", "model.vocab_size=512"], "it belongs to model.preset"),
        (["optim={name: sgd, momentum: 0, nesterov: true}"], "optim.nesterov: seen true, expected false"),
        (["optim.rules=[{pattern: x}]"], "this rule changes nothing"),
        (["data.packing=pad", "data.document_mask=true"], "data.document_mask: seen true, expected auto or false"),
        (["data.source=[{source: a, weight: 1}, b]"], "a weight for every source or for none"),
        (["data.validation=none", "train.early_stopping={patience: 2}"], "no early_stopping: data.validation is none"),
    ],
)
def test_a_value_without_effect_is_an_error(overrides: list[str], message: str) -> None:
    assert message in problems(BASE, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps='100'", "train.steps: seen '100', expected null or a whole number >= 1"),
        ("train.steps=true", "train.steps: seen true"),
        ("train.steps=1.5", "train.steps: seen 1.5"),
        ("checkpoint.asynchronous=yes", "checkpoint.asynchronous: seen 'yes', expected true or false"),
        ("checkpoint.asynchronous=1", "checkpoint.asynchronous: seen 1, expected true or false"),
        ("optim.lr=.nan", "optim.lr: seen nan"),
        ("optim.betas=[0.9]", "optim.betas: seen [0.9], expected a list of 2 values"),
        ("optim.betas=[0.9, 1.0]", "optim.betas"),
        ("train.time=100 steps", "train.time: seen '100 steps', expected null or a time"),
        ("model.preset=null", "exactly one of the keys preset, path, hf, config"),
        ("model.config={num_layers: 3}", "a field `family`"),
        ("model.hf='a b'", "model.hf: seen 'a b', expected owner/name"),
        ("data.source=[]", "data.source: seen [], expected at least one source"),
        ("data.tokenizer=bert", "data.tokenizer: seen 'bert', expected auto"),
        ("data.tokenizer={train: unigram}", "data.tokenizer: seen the keys train, expected"),
        ("data.validation={fraction: 2}", "data.validation.fraction: seen 2, expected a number above 0 and below 1"),
        (
            "optim.rules=[{pattern: '(', lr_scale: 2}]",
            "optim.rules.0.pattern: seen '(', expected null or a regular expression",
        ),
        ("checkpoint.keep=0", "checkpoint.keep: seen 0"),
        ("run.sample={}", "run.sample.prompts: missing; expected a value"),
        ("train.seed.deep=1", "override train.seed.deep=1  train.seed: seen the keys deep"),
        ("data.source.9=x", "data.source.9: expected the number of an item, 0 to 1"),
        ("optim=[1]", "optim: seen [1], expected"),
        ("nonsense", "expected key=value"),
        ("train.seed=", "expected key=value"),
        ("train.seed={a", "not valid YAML"),
    ],
)
def test_wrong_values_say_what_was_seen_and_expected(override: str, message: str) -> None:
    assert message in problems(BASE, [override])


@pytest.mark.parametrize("column", [0, -1, "0", "texte", "正文"])
def test_columns_have_names_or_numbers(column: str | int) -> None:
    data = {"source": "a.csv", "columns": {"text": column}}
    assert load_recipe({"model": {"preset": "llama-1m"}, "data": data}).recipe.data.columns == {"text": column}


@pytest.mark.parametrize("column", [True, None, "", 1.5, ["a"]])
def test_columns_are_nothing_else(column: Any) -> None:
    data = {"source": "a.csv", "columns": {"text": column}}
    with pytest.raises(ConfigError, match="expected the name of a column, or its number from 0"):
        load_recipe({"model": {"preset": "llama-1m"}, "data": data})


def test_missing_sections_are_named() -> None:
    message = problems("train: {steps: 3}\n")
    assert "model: missing" in message
    assert "data: missing" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1  seen nothing"),
        ("- a\n", "r.yaml:1  seen a list"),
        (BASE + "train:\n  seed: 1\n  seed: 2\n", "r.yaml:5  train.seed: seen this key twice, first on line 4"),
        (BASE + "train: {seed: [1\n", "r.yaml:4  not valid YAML"),
        (BASE + "train:\n\tseed: 1\n", "r.yaml:4  not valid YAML"),
        (BASE + "run: {name: !!python/object/apply:os.system [ls]}\n", "r.yaml:3  run.name: seen the tag"),
        (BASE + "run: {name: !secret x}\n", "r.yaml:3  run.name: seen the tag '!secret'"),
        (BASE + "1: 2\n", "r.yaml:3  seen a key that is not plain text"),
        (BASE + "<<: {a: 1}\n", "r.yaml:3"),
        (BASE + "---\nmodel: x\n", "not valid YAML: expected a single document"),
        (BASE + "a: &a [*a]\n", "an anchor that contains itself"),
        ("a: " + "[" * 200 + "]" * 200, "levels"),
        ("a: " + "[" * 5000, "r.yaml"),
        ("x" * 1_000_001, "at most 1,000,000"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    assert message in problems(text)


def test_nothing_in_a_recipe_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    text = BASE + f"run: {{description: !!python/object/apply:os.mkdir ['{target}']}}\n"
    assert "tag" in problems(text)
    assert not target.exists()


def test_a_small_file_cannot_become_a_large_one() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 50,000 values" in problems("\n".join(lines))


def test_anchors_are_fine_where_they_are_small() -> None:
    text = "model: {preset: a}\ndata: {source: &s x.txt, validation: {source: *s}}\n"
    assert load_recipe_text(text).recipe.data.to_dict()["validation"] == {"source": [{"source": "x.txt"}]}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_recipe(binary)


def test_chinese_stays_whole() -> None:
    message = problems("model: {preset: 小模型}\ndata: {源: 文本}\n", ["run.name=甲/乙"])
    assert "r.yaml:2" in message
    assert "data.源: unknown key" in message
    assert "seen '甲/乙'" in message


def test_a_dict_is_checked_like_a_file() -> None:
    wrong: dict[str, Any] = {"model": {"preset": "a", "path": "b"}, "data": {"source": 3}, "x": 1}
    with pytest.raises(ConfigError) as error:
        load_recipe(wrong)
    message = str(error.value)
    assert message.startswith("3 problems in recipe\n")
    assert "model: seen the keys preset, path, expected exactly one of the keys" in message
