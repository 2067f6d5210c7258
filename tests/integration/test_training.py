"""From a recipe to a run folder: what is written, that it learns, that it resumes exactly, what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.base.errors import ConfigError, DataError, DivergedError, ModelError, RunInUseError
from trainwright.base.faults import InjectedFault
from trainwright.checkpoint import RunLock, list_checkpoints, load_checkpoint
from trainwright.cli.runs import show_lines
from trainwright.config import load_recipe
from trainwright.monitor import read_history
from trainwright.trainer import Callback, Trainer, export_run

Tiny = Callable[..., dict[str, Any]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max():.3g}"


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run that the others are compared with."""
    return Trainer(tiny(tmp_path_factory.mktemp("runs"))).fit().folder


def test_the_run_folder_is_complete_and_says_what_happened(finished: Path) -> None:
    info = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "finished"
    assert info["result"]["steps"] == 12
    assert info["result"]["tokens"] == 12 * 512
    assert info["predicted"]["tokens_per_second"] > 0
    assert info["measured"]["memory_bytes"] > 0
    assert info["environment"]["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert [session["status"] for session in info["sessions"]] == ["finished"]
    assert (
        "auto"
        not in (finished / "plan.json").read_text(encoding="utf-8").split('"decisions"')[1].split('"value"')[1][:20]
    )
    assert [checkpoint.step for checkpoint in list_checkpoints(finished / "checkpoints")] == [6, 9, 12]


def test_it_learns_and_beats_the_unigram_line_of_its_own_tokens(finished: Path) -> None:
    evaluations = list(read_history(finished / "metrics.jsonl", "eval"))
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    losses = [record["loss"] for record in evaluations]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < math.log(512)
    assert evaluations[0]["baselines"]["bigram"] < evaluations[0]["baselines"]["unigram"] < math.log(512)


def test_every_step_is_recorded_once(finished: Path) -> None:
    steps = [record["step"] for record in read_history(finished / "metrics.jsonl", "step")]
    assert steps == list(range(1, 13))


def test_the_resolved_recipe_repeats_the_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = Trainer(finished / "recipe.resolved.yaml", overrides=[f"run.dir={tmp_path}"]).fit()
    assert_same_weights(finished, again.folder)


def test_accumulation_and_micro_batches_do_not_change_the_result(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    """fp32 sums in another order: losses agree to 1e-6 relative, as sums and counts promise."""
    whole = list(read_history(finished / "metrics.jsonl", "step"))
    for rows in (1, 8):
        result = Trainer(tiny(tmp_path), overrides=[f"train.micro_batch={rows}", f"run.name=m{rows}"]).fit()
        for one, other in zip(whole, read_history(result.folder / "metrics.jsonl", "step"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize("point", ["step.after_backward", "data.next", "save.before_commit", "save.after_commit"])
def test_resume_after_a_failure_is_bitwise_equal(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    recipe = tiny(tmp_path)
    recipe["checkpoint"]["asynchronous"] = False
    step = "step=6" if point.startswith("save") else "step=7"
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", f"{point}:raise@{step}")
    if point.startswith("save"):
        # A failed periodic save is reported and training goes on; what is saved later counts.
        Trainer(recipe).fit()
    else:
        with pytest.raises(InjectedFault):
            Trainer(recipe).fit()
        monkeypatch.delenv("TRAINWRIGHT_FAULTS")
        info = json.loads((tmp_path / "tiny" / "run.json").read_text(encoding="utf-8"))
        assert info["status"] == "failed"
        assert Trainer(recipe, resume="auto").fit().folder == tmp_path / "tiny"
    assert_same_weights(finished, tmp_path / "tiny")
    steps = [record["step"] for record in read_history(tmp_path / "tiny" / "metrics.jsonl", "step")]
    assert steps == list(range(1, 13))


def test_a_stop_request_saves_and_the_resumed_run_is_bitwise_equal(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from trainwright.base.errors import Interrupted

    class Terminate(Callback):
        name = "terminate"

        def on_step_end(self, run: Any, report: Any) -> None:
            if run.state.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(Interrupted, match="after step 5 of 12"):
        Trainer(tiny(tmp_path), callbacks=[Terminate()]).fit()
    assert json.loads((tmp_path / "tiny" / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert [c.step for c in list_checkpoints(tmp_path / "tiny" / "checkpoints")][-1] == 5

    class Quiet(Terminate):
        def on_step_end(self, run: Any, report: Any) -> None:
            return None

    Trainer(tiny(tmp_path), resume="auto", callbacks=[Quiet()]).fit()
    assert_same_weights(finished, tmp_path / "tiny")


def test_asynchronous_saves_do_not_change_the_numbers(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    synchronous = Trainer(tiny(tmp_path), overrides=["checkpoint.asynchronous=false", "checkpoint.every=1 steps"]).fit()
    assert_same_weights(finished, synchronous.folder)


def test_transformers_opens_the_model_and_computes_the_same_logits(finished: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from trainwright.models import load_pretrained

    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    ours = load_pretrained(finished / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer("def main():\n    return 1", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_exports_to_the_same_model(finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "out", step=12)
    exported, final = load_file(tmp_path / "out" / "model.safetensors"), weights(finished)
    assert all(torch.equal(exported[name], final[name]) for name in final)
    with pytest.raises(ConfigError, match="not empty"):
        export_run(finished, tmp_path / "out")


def test_the_moving_average_is_evaluated_and_exported(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe["train"]["ema"] = {"decay": 0.9}
    folder = Trainer(recipe).fit().folder
    state, _ = load_checkpoint(folder / "checkpoints" / "step-12")
    exported = weights(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], state["engine"]["ema"]["averages"][name])
    assert not torch.equal(exported[name], state["engine"]["model"][name])


def test_early_stopping_ends_the_run_in_order(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe["train"]["early_stopping"] = {"patience": 1, "min_delta": 10.0}
    result = Trainer(recipe).fit()
    assert result.steps == 8
    assert (result.folder / "model" / "config.json").exists()
    why = r"stopped early at step 8: validation loss has not got better than \d\.\d{4} by more than 10 in 1 evaluation"
    notice = next(iter(read_history(result.folder / "metrics.jsonl", "notice")))["message"]
    assert re.fullmatch(why, notice)
    assert not list(read_history(result.folder / "metrics.jsonl", "warning"))
    (end,) = read_history(result.folder / "metrics.jsonl", "run.end")
    assert end["text"].splitlines()[1] == notice
    assert json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["result"]["stopped_early"] == notice
    assert any(line.endswith(f"finished, {notice}") for line in show_lines(result.folder))


def test_patience_that_ends_with_the_budget_stops_nothing_early(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe["train"] |= {"steps": 8, "early_stopping": {"patience": 1, "min_delta": 10.0}}
    folder = Trainer(recipe).fit().folder
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["result"]["stopped_early"] is None
    (end,) = read_history(folder / "metrics.jsonl", "run.end")
    assert "early" not in end["text"]


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "lion", "muon"])
def test_every_optimizer_trains_and_resumes(
    tiny: Tiny, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str) -> dict[str, Any]:
        made = tiny(tmp_path, name)
        made["optim"] = {"name": optimizer, "lr": 1e-3}
        return made

    whole = Trainer(recipe("whole")).fit()
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:raise@step=8")
    with pytest.raises(InjectedFault):
        Trainer(recipe("torn")).fit()
    monkeypatch.delenv("TRAINWRIGHT_FAULTS")
    assert_same_weights(whole.folder, Trainer(recipe("torn"), resume="auto").fit().folder)
    first = next(iter(read_history(whole.folder / "metrics.jsonl", "step")))["loss"]
    assert whole.validation_loss is not None
    assert whole.validation_loss < first


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_lower_precisions_train(finished: Path, tiny: Tiny, tmp_path: Path, precision: str) -> None:
    recipe = tiny(tmp_path)
    recipe["precision"] = precision
    result = Trainer(recipe).fit()
    full = list(read_history(finished / "metrics.jsonl", "eval"))[-1]["loss"]
    # bf16 keeps 8 bits of a product: measured here, 12 steps end within 0.01 nats of fp32.
    assert result.validation_loss == pytest.approx(full, abs=0.05)


# --- refused ---


def test_a_resume_with_other_values_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    Trainer(tiny(tmp_path)).fit()
    (tmp_path / "tiny" / "run.json").write_text(
        (tmp_path / "tiny" / "run.json")
        .read_text(encoding="utf-8")
        .replace('"status": "finished"', '"status": "running"', 1)
    )
    with pytest.raises(ConfigError, match=r"optim\.lr.*0\.003.*0\.5"):
        Trainer(tiny(tmp_path), overrides=["optim.lr=0.5"], resume="auto").fit()


def test_a_run_is_resumed_from_its_own_resolved_recipe(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:raise@step=8")
    with pytest.raises(InjectedFault):
        Trainer(tiny(tmp_path)).fit()
    monkeypatch.delenv("TRAINWRIGHT_FAULTS")
    assert Trainer(tmp_path / "tiny", resume=str(tmp_path / "tiny")).fit().steps == 12


def test_a_resume_with_another_dataset_is_refused(
    tiny: Tiny, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    recipe = tiny(tmp_path)
    recipe["data"]["source"] = str(text)
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:raise@step=8")
    with pytest.raises(InjectedFault):
        Trainer(recipe).fit()
    monkeypatch.delenv("TRAINWRIGHT_FAULTS")
    (text / "new.py").write_text("print('one more file')\n" * 50, encoding="utf-8")
    with pytest.raises((DataError, ModelError), match=r"changed|differ"):
        Trainer(recipe, resume="auto").fit()


def test_a_finished_run_has_nothing_to_resume_and_a_new_one_gets_its_own_folder(tiny: Tiny, tmp_path: Path) -> None:
    assert Trainer(tiny(tmp_path)).fit().folder.name == "tiny"
    with pytest.raises(ConfigError, match="has finished"):
        Trainer(tiny(tmp_path), resume="auto").fit()
    assert Trainer(tiny(tmp_path), overrides=["train.steps=1"]).fit().folder.name == "tiny-2"


def test_a_folder_in_use_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:raise@step=8")
    with pytest.raises(InjectedFault):
        Trainer(tiny(tmp_path)).fit()
    monkeypatch.delenv("TRAINWRIGHT_FAULTS")
    lock = RunLock(tmp_path / "tiny")
    try:
        with pytest.raises(RunInUseError):
            Trainer(tiny(tmp_path), resume="auto").fit()
    finally:
        lock.release()


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_state(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe["optim"] = {"name": "sgd", "lr": 1e20, "clip_norm": None, "schedule": {"name": "constant", "warmup": 0}}
    with pytest.raises(DivergedError, match=r"is (nan|inf)"):
        Trainer(recipe).fit()
    assert json.loads((tmp_path / "tiny" / "run.json").read_text(encoding="utf-8"))["status"] == "diverged"


def test_a_gradient_that_is_not_a_number_is_skipped_or_stops(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:nan@step=5")
    folder = Trainer(tiny(tmp_path), overrides=["train.on_nan=skip"]).fit().folder
    skipped = [record["step"] for record in read_history(folder / "metrics.jsonl", "step") if record["skipped"]]
    assert skipped == [6]
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    with pytest.raises(DivergedError, match=r"step 6: gradient norm is nan"):
        Trainer(tiny(tmp_path), overrides=["train.on_nan=stop", "run.name=stopped"]).fit()
    state, _ = load_checkpoint(list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1].path)
    assert all(torch.isfinite(tensor).all() for tensor in state["engine"]["model"].values())


def test_a_tokenizer_larger_than_the_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe["model"] = {"preset": "llama-1m", "vocab_size": 100}
    with pytest.raises(ModelError, match=r"512 tokens.*holds 100"):
        Trainer(recipe).fit()


def test_values_reach_the_parts_that_they_name(tiny: Tiny, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(Callback):
        name = "look"

        def on_run_start(self, run: Any) -> None:
            seen["groups"] = {group["weight_decay"] for group in run.engine.optimizer.param_groups}
            seen["smoothing"] = run.task.label_smoothing
            seen["frozen"] = [name for name, p in run.engine.model.named_parameters() if not p.requires_grad]

    recipe = tiny(tmp_path)
    recipe["task"] = {"name": "causal_lm", "label_smoothing": 0.1}
    recipe["optim"] = {"lr": 1e-3, "weight_decay": 0.3, "rules": [{"pattern": "embed_tokens", "freeze": True}]}
    recipe["train"]["steps"] = 1
    Trainer(load_recipe(recipe), callbacks=[Look()]).fit()
    assert seen["groups"] == {0.0, 0.3}
    assert seen["smoothing"] == 0.1
    assert seen["frozen"] == ["model.embed_tokens.weight"]
