"""Tasks made of records as users run them: recipes, real formats, builds killed without warning, two at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainwright.base.errors import DataError
from trainwright.base.faults import FAULTS_VARIABLE
from trainwright.cli import main as cli
from trainwright.config import load_recipe
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.checks import padding_share
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.spec import example_spec
from trainwright.data.loader import Loader
from trainwright.tasks.registry import DEFINITIONS

SFT = """
task: sft
model: {{preset: gpt2-nano}}
data:
  source: {source}
  sequence_length: {length}
  tokenizer: {{train: char}}
  packing: {packing}
  cache: {cache}
"""

PROGRAM = """
import sys
from trainwright.config import load_recipe
from trainwright.data.examples import encoding
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.spec import example_spec
from trainwright.tasks.registry import DEFINITIONS
encoding.WORTH_SECONDS = 0.0
recipe = load_recipe(sys.argv[1]).recipe
definition = DEFINITIONS[recipe.task.name](recipe.task, recipe.data.sequence_length)
print("building", flush=True)
dataset = build_examples(
    example_spec(recipe.data, recipe.task), definition, recipe.data.cache, workers=int(sys.argv[2])
)
print(dataset.fingerprint)
"""


def write_recipe(
    folder: Path, *, pairs: int = 600, length: int = 96, packing: str = "best_fit", text: str = SFT
) -> Path:
    """A recipe of sums as chats, and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(10, 40) for b in range(10, 40)][:pairs]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        text.format(source=folder / "sums.jsonl", length=length, packing=packing, cache=folder / "cache"),
        encoding="utf-8",
    )
    return recipe


def start(recipe: Path, workers: int = 1, faults: str = "") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != FAULTS_VARIABLE}
    if faults:
        environment[FAULTS_VARIABLE] = faults
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(recipe), str(workers)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def built(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / "cache").iterdir()) if not path.name.startswith(".")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    code = cli.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def dataset_of(recipe: Path, *overrides: str) -> ExampleDataset:
    loaded = load_recipe(str(recipe), overrides).recipe
    definition = DEFINITIONS[loaded.task.name](loaded.task, loaded.data.sequence_length)
    return build_examples(example_spec(loaded.data, loaded.task), definition, loaded.data.cache)


@pytest.mark.slow
def test_killed_builds_leave_nothing_half_and_two_at_once_make_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for fault in ("examples.encode:kill@number=512", "examples.before_rename:kill"):
        process = start(recipe, faults=fault)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        assert built(tmp_path) == []
    both = [start(recipe), start(recipe, workers=2)]
    printed = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    fingerprints = {output.split()[-1] for output, _ in printed}
    (folder,) = built(tmp_path)
    assert fingerprints == {ExampleDataset.open(folder, verify="hashes").fingerprint}
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith(".partial")] == []


def test_preview_build_and_inspect_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    code, shown = run(capsys, "data", "build", str(recipe))
    assert code == 0, shown
    folder = shown.splitlines()[0]
    assert re.search(r"train +5\d\d records, 5\d\d examples", shown)
    assert re.search(r"<\|im_end\|> ends what is written: trained 5\d\d times", shown)
    code, shown = run(capsys, "data", "preview", str(recipe), "--rows", "2")
    assert code == 0, shown
    row = dataset_of(recipe).records("train", [0])[0]
    assert row["messages"][0]["role"] == "user"
    assert re.search(r"<\|im_start\|>user↵\d\d \+ \d\d = ", shown)
    assert re.search(r"«\d\d<\|im_end\|>»", shown)
    code, shown = run(capsys, "data", "preview", folder, "--split", "validation")
    assert code == 0, shown
    assert "1 example, " in shown
    code, shown = run(capsys, "data", "inspect", folder)
    assert code == 0, shown
    assert "every block matches its hash" in shown


def test_a_recipe_without_an_example_is_refused_by_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows so short that every answer lies beyond them: the command ends with the exit code of data."""
    recipe = write_recipe(
        tmp_path, length=12, packing="pad", text=SFT.replace("task: sft", "task: {{name: sft, long: cut_end}}")
    )
    code, shown = run(capsys, "data", "build", str(recipe), "data.max_drop=1")
    assert code == 3, shown
    assert "training records gives an example" in shown
    assert "longer than data.sequence_length" in shown


def test_drops_are_bounded_from_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, pairs=40)
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "tell me all " * 20, "completion": "no"}) * 1 + "\n")
        file.write(json.dumps({"prompt": "tell me more " * 20, "completion": "no"}) + "\n")
    with pytest.raises(
        DataError, match=r"records \((\d|\.)+%\) give no example, more than the 1\.0% of data\.max_drop"
    ):
        dataset_of(recipe, "data.max_drop=0.01", "data.validation={fraction: 0.2}", "data.on_error=skip")
    dataset = dataset_of(recipe, "data.max_drop=0.5", "data.validation={fraction: 0.2}", "data.on_error=skip")
    assert sum(dataset.facts(split).dropped_records for split in dataset.splits) == 2


def test_packed_and_padded_rows_train_the_same_tokens(tmp_path: Path) -> None:
    packed, padded = (dataset_of(write_recipe(tmp_path / name, packing=name)) for name in ("best_fit", "pad"))
    for name in ("trained_tokens", "inputs", "examples"):
        assert getattr(packed.facts("train"), name) == getattr(padded.facts("train"), name)
    assert packed.rows("train") < padded.rows("train") / 2

    def trained(dataset: ExampleDataset) -> list[int]:
        batch = dataset.batch("train", np.arange(dataset.rows("train")))
        return sorted(batch["labels"][batch["labels"] != -100].tolist())

    assert trained(packed) == trained(padded)


def test_a_real_set_of_questions(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """TREC as its authors distribute it: format, encoding and labels found; grouping by length halves the padding."""
    recipe = tmp_path / "trec.yaml"
    recipe.write_text(
        "task: classification\nmodel: {preset: gpt2-nano}\ndata:\n"
        f"  source: {shared_data('sentclf_kim2014/TREC.train.all')}\n"
        f"  test: {shared_data('sentclf_kim2014/TREC.test.all')}\n"
        f"  encoding: latin-1\n  sequence_length: 64\n  cache: {tmp_path / 'cache'}\n"
        "  tokenizer: {train: word, lowercase: true}\n"
    )
    dataset = dataset_of(recipe)
    assert dataset.facts("train").records + dataset.facts("validation").records == 5452
    assert dataset.facts("test").records == 500
    assert all(dataset.facts(split).dropped_records == 0 for split in dataset.splits)

    def padding(grouped: bool) -> float:
        loader = Loader(dataset, 32, seed=1, prefetch=0, group_by_length=grouped)
        batches = [loader.batch(step) for step in range(dataset.rows("train") // 32)]
        return 1 - sum(int(b["lengths"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)

    assert padding_share(dataset, 32, seed=1) == pytest.approx(padding(False), abs=0.01)
    assert padding(True) < 0.55 * padding(False)
