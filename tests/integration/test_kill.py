"""kill -9 at twenty random moments, saves included: the resumed run ends bit for bit where the undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.monitor import read_history

KILLS = 20
STEPS = 240

DRIVER = """
import json, sys
from trainwright.trainer import Callback, Trainer

class Tick(Callback):
    name = "tick"
    def on_step_end(self, run, report):
        print(run.state.step, flush=True)

if __name__ == "__main__":
    recipe = json.load(open(sys.argv[1], encoding="utf-8"))
    Trainer(recipe, resume="auto", callbacks=[Tick()]).fit()
"""


def start(driver: Path, recipe: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(driver), str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_twenty_kills(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    recipes = {}
    for name in ("undisturbed", "killed"):
        recipe = tiny(tmp_path / "runs", name)
        recipe["train"] |= {"steps": STEPS, "eval_every": "40 steps"}
        recipe["checkpoint"] = {"every": "2 steps", "keep": 2}
        recipes[name] = tmp_path / f"{name}.json"
        recipes[name].write_text(json.dumps(recipe), encoding="utf-8")
    whole = start(driver, recipes["undisturbed"])
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors

    random_moments = random.Random(20)
    reached = []
    for _ in range(KILLS):
        process = start(driver, recipes["killed"])
        assert process.stdout is not None
        last = 0
        wanted = random_moments.randint(1, 14)
        while wanted:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            if line.strip().isdigit():  # the rest are warnings about what the last kill left behind
                last, wanted = int(line), wanted - 1
        time.sleep(random_moments.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached.append(last)
    finish = start(driver, recipes["killed"])
    _, errors = finish.communicate(timeout=300)
    assert finish.returncode == 0, errors

    assert len(set(reached)) > KILLS // 2, f"the kills fell on too few moments: {reached}"
    runs = tmp_path / "runs"
    one, other = (load_file(runs / name / "model" / "model.safetensors") for name in ("undisturbed", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    histories = [
        {record["step"]: record["loss"] for record in read_history(runs / name / "metrics.jsonl", "step")}
        for name in ("undisturbed", "killed")
    ]
    # A killed process loses the second of records that it had not written yet; those that are there are the same.
    assert all(histories[0][step] == loss for step, loss in histories[1].items())
    assert histories[1][STEPS] == histories[0][STEPS]
    evaluations = [
        list(read_history(runs / name / "metrics.jsonl", "eval"))[-1]["loss"] for name in ("undisturbed", "killed")
    ]
    assert evaluations[0] == evaluations[1]
