"""Training on several ranks: the same run as on one, stopped on four ranks and resumed on two and three, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.base.errors import Interrupted
from trainwright.monitor import read_history
from trainwright.testing import run_ranks
from trainwright.trainer import Callback, Trainer

Tiny = Callable[..., dict[str, Any]]

STEPS, ROWS = 12, 12  # 12 rows a step: 1, 2, 3 and 4 ranks can share them


class Ledger(Callback):
    """Writes down which rows this rank trained in which step, and kills the process in the step that it is told."""

    name = "ledger"

    def __init__(self, folder: Path, fall_in: int | None) -> None:
        self.folder = folder
        self.fall_in = fall_in

    def on_step_end(self, run: Any, report: Any) -> None:
        step = run.state.step
        entry = {"step": step, "rank": run.ranks.rank, "world": run.ranks.world}
        entry["rows"] = run.loader.rows(step - 1).tolist()
        with open(self.folder / f"{run.ranks.world}-{run.ranks.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if step == self.fall_in:
            raise Fall


class Fall(Exception):
    """Stands for a process that ends without saving: the run goes on from the checkpoint before."""


def fit(rank: int, world: int, recipe: dict[str, Any], ledger: str, fall_in: int | None, resume: str) -> str:
    try:
        Trainer(recipe, resume=resume, callbacks=[Ledger(Path(ledger), fall_in)]).fit()
    except Fall:
        return "fell"
    except Interrupted:
        return "interrupted"
    return "finished"


def recipe_for(tiny: Tiny, runs: Path, name: str, **parallel: Any) -> dict[str, Any]:
    recipe = tiny(runs, name)
    recipe["train"] |= {"steps": STEPS, "batch_tokens": ROWS * 64, "micro_batch": "auto", "eval_every": "6 steps"}
    recipe["optim"] |= {"schedule": {"name": "wsd", "warmup": "2 steps"}}
    return {**recipe, **({"parallel": parallel} if parallel else {})}


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_history(folder / "metrics.jsonl", "step")}


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of one process."""
    runs = tmp_path_factory.mktemp("alone")
    ledger = runs / "ledger"
    ledger.mkdir()
    assert fit(0, 1, recipe_for(tiny, runs, "alone"), str(ledger), None, "never") == "finished"
    return runs


def rows_by_step(folder: Path) -> dict[int, list[int]]:
    """Rows of each step in the order of ranks, by the sessions that counted: the last that did the step."""
    found: dict[int, dict[int, tuple[int, list[int]]]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], {})[entry["rank"]] = (entry["world"], entry["rows"])
    result = {}
    for step, ranks in found.items():
        world = min(w for w, _ in ranks.values())  # a step done again on fewer ranks: theirs count
        result[step] = [row for rank in range(world) for row in ranks[rank][1]]
    return result


def test_four_ranks_then_two_then_three_train_the_rows_of_one(tiny: Tiny, alone: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    recipe = recipe_for(tiny, tmp_path, "many", zero=3)
    # Checkpoints come every 3 steps: each fall loses a step, which is done again.
    assert run_ranks(fit, 4, recipe, str(ledger), 4, "never", timeout=120) == ["fell"] * 4
    recipe["parallel"] = {"zero": 1}
    assert run_ranks(fit, 2, recipe, str(ledger), 7, "auto", timeout=120) == ["fell"] * 2
    done_by_two = {4: 2, 5: 2, 6: 2}
    recipe["parallel"] = {"zero": 2, "accumulate": "sharded"}
    assert run_ranks(fit, 3, recipe, str(ledger), None, "auto", timeout=120) == ["finished"] * 3

    per_step: dict[int, dict[int, dict[int, list[int]]]] = {}
    for path in ledger.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            per_step.setdefault(entry["step"], {}).setdefault(entry["world"], {})[entry["rank"]] = entry["rows"]
    expected = rows_by_step(alone / "ledger")
    assert sorted(per_step) == list(range(1, STEPS + 1))
    for step, sessions in per_step.items():
        for world, ranks in sessions.items():
            assert sorted(ranks) == list(range(world))
            assert [row for rank in range(world) for row in ranks[rank]] == expected[step], (step, world)
    assert {step: min(sessions) for step, sessions in per_step.items() if step in done_by_two} == done_by_two

    mine, theirs = losses(tmp_path / "many"), losses(alone / "alone")
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    for step, loss in theirs.items():
        assert mine[step] == pytest.approx(loss, rel=1e-5), step
    a = load_file(tmp_path / "many" / "model" / "model.safetensors")
    b = load_file(alone / "alone" / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.allclose(tensor, b[name], atol=2e-5), name
    info = json.loads((tmp_path / "many" / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "finished"
    assert info["ranks"] == 3
    assert info["result"]["tokens"] == STEPS * ROWS * 64


def test_resume_in_the_same_layout_is_bitwise(tiny: Tiny, tmp_path: Path) -> None:
    undisturbed = recipe_for(tiny, tmp_path, "undisturbed", zero=2)
    stopped = recipe_for(tiny, tmp_path, "stopped", zero=2)
    (tmp_path / "ledger").mkdir()
    run_ranks(fit, 2, undisturbed, str(tmp_path / "ledger"), None, "never", timeout=120)
    run_ranks(fit, 2, stopped, str(tmp_path / "ledger"), 8, "never", timeout=120)
    run_ranks(fit, 2, stopped, str(tmp_path / "ledger"), None, "auto", timeout=120)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    a = load_file(tmp_path / "stopped" / "model" / "model.safetensors")
    b = load_file(tmp_path / "undisturbed" / "model" / "model.safetensors")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def ask_one_rank(rank: int, world: int, recipe: dict[str, Any]) -> str:
    import os
    import signal

    class Ask(Callback):
        name = "ask"

        def on_step_end(self, run: Any, report: Any) -> None:
            if run.ranks.rank == 1 and run.state.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        Trainer(recipe, callbacks=[Ask()]).fit()
    except Interrupted as stopped:
        return str(stopped)
    return "finished"


def test_a_stop_asked_of_one_rank_stops_all_after_the_same_step(tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "asked", zero=3)
    for said in run_ranks(ask_one_rank, 2, recipe, timeout=120):
        assert "after step 5 of 12" in said
    assert (tmp_path / "asked" / "checkpoints" / "step-5").exists()
