"""`trainwright eval` and `predict` on finished runs: the numbers of the run's own report, and predictions in order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import load_recipe
from trainwright.trainer import Trainer, export_run
from trainwright.trainer.trained import open_trained

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "examples" / "samples"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shrunk runs of three recipes in one folder, which holds the examples too."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    for name, precision in (("trec", "bf16"), ("conll2003", "fp32"), ("sft-dolly", "bf16_pure")):
        changes = [f"run.dir={folder}", f"run.name={name}", f"data.cache={folder / 'cache'}", f"precision={precision}"]
        recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml", changes, smoke=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            Trainer(recipe).fit()
    return folder


def judged(trainwright: Run, *arguments: str, cwd: Path) -> dict[str, float]:
    done = trainwright("eval", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["trec", "conll2003", "sft-dolly"])
def test_eval_says_what_the_run_reported(runs: Path, trainwright: Run, name: str) -> None:
    reported = json.loads((runs / name / "report.json").read_text(encoding="utf-8"))["validation"]
    found = judged(trainwright, name, "--split", "validation", cwd=runs)
    assert found.pop("count") > 0
    assert found == pytest.approx(reported, abs=1e-5, nan_ok=True)
    if name != "conll2003":
        other = judged(trainwright, name, "--split", "validation", "--precision", "fp32", cwd=runs)
        assert other["loss"] != pytest.approx(reported["loss"], abs=1e-7), "another precision was asked for"


def test_models_are_opened_in_the_precision_of_their_run(runs: Path) -> None:
    for name, precision in (("trec", "bf16"), ("conll2003", "fp32"), ("sft-dolly", "bf16_pure")):
        for folder in (runs / name, runs / name / "model"):
            assert open_trained(folder).engine.precision.name == precision
    for precision in ("fp32", "fp16"):
        assert open_trained(runs / "trec", numbers=precision).engine.precision.name == precision
    with pytest.raises(ConfigError, match="precision 'fp4' is not one of"):
        open_trained(runs / "trec", numbers="fp4")


def test_files_are_read_with_the_columns_of_the_run(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    shutil.copytree(runs / "trec" / "model", tmp_path / "model")
    task = json.loads((tmp_path / "model" / "trainwright_task.json").read_text(encoding="utf-8"))
    task["data"] |= {"columns": {"text": "问", "label": "类"}, "format": "auto"}
    (tmp_path / "model" / "trainwright_task.json").write_text(json.dumps(task), encoding="utf-8")

    def texts(*arguments: str, **options: Any) -> list[str]:
        done = trainwright("predict", "model", *arguments, cwd=tmp_path, **options)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    same = written(tmp_path / "a" / "a.jsonl", {"问": "哪年 ?", "text": "not this"})
    assert texts(str(same)) == texts(str(same), "--format", "auto") == ["哪年 ?"]
    assert texts("-", input=same.read_text(encoding="utf-8")) == ["哪年 ?"]
    assert texts("-", input="Who ?\n") == ["Who ?"]
    usual = written(tmp_path / "a" / "b.jsonl", {"text": "哪年 ?"})
    assert texts(str(usual), "--format", "auto") == texts(str(usual), "--column", "text=text") == ["哪年 ?"]
    other = written(tmp_path / "a" / "c.jsonl", {"内容": "哪年 ?"})
    assert texts(str(other), "--column", "text=内容") == ["哪年 ?"]
    for arguments in ((), ("--format", "auto")):
        done = trainwright("predict", "model", str(other), *arguments, cwd=tmp_path)
        assert done.returncode == 3
        assert "c.jsonl:1: " in done.stderr
        assert "内容" in done.stderr
        assert "-> give --column text=内容" in done.stderr


def test_eval_of_the_bare_model_folder_on_a_file(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    shutil.copytree(runs / "trec" / "model", tmp_path / "model")
    found = judged(trainwright, "model", "--data", str(SAMPLES / "questions.txt"), "--out", "out", cwd=tmp_path)
    lines = (SAMPLES / "questions.txt").read_text(encoding="latin-1").splitlines()
    assert found["count"] == len([line for line in lines if line.strip()])
    stored = json.loads((tmp_path / "out" / "questions.json").read_text(encoding="utf-8"))
    assert stored["metrics"]["accuracy"] == found["accuracy"]
    assert sum(map(sum, stored["confusion"])) == found["count"]
    wrong = (tmp_path / "out" / "questions-errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(wrong) == round((1 - found["accuracy"]) * found["count"])
    assert (tmp_path / "out" / "questions-confusion.svg").read_text(encoding="utf-8").startswith("<svg")


def test_predict_answers_line_by_line(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    texts = ["What is a cat ?", "Who wrote Hamlet ?", "哪一年？"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    done = trainwright("predict", str(runs / "trec"), "texts.jsonl", "--format", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in found] == texts
    for line in found:
        assert line["label"] == max(line["probability"], key=line["probability"].get)
        assert sum(line["probability"].values()) == pytest.approx(1, abs=1e-4)


def test_lines_of_a_file_are_texts(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    texts = ["What is a\u2028cat ?", "哪一年？"]  # a line ends at line feeds alone
    (tmp_path / "texts.txt").write_text("\ufeff" + texts[0] + "\r\n\n" + texts[1], encoding="utf-8")
    for run in ("trec", "conll2003", "sft-dolly"):
        done = trainwright("predict", str(runs / run), "texts.txt", "--format", "lines", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]
        assert len(found) == len(texts)
        if run == "sft-dolly":
            assert all(set(answer) == {"text", "ended", "tokens"} for answer in found)
        else:
            assert [line["text"] for line in found] == texts
    done = trainwright("predict", str(runs / "conll2003"), "texts.txt", cwd=tmp_path)
    assert done.returncode == 3
    assert "--format lines" in done.stderr


def test_tags_come_back_as_columns(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    source = SAMPLES / "entities.conll"
    arguments = ("predict", str(runs / "conll2003"), str(source), "--out", "tagged.conll", "--to", "conll")
    done = trainwright(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def words(path: Path) -> list[str]:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    expected = [word for word in words(source) if word != "-DOCSTART-"]
    assert [word for word in words(tmp_path / "tagged.conll") if word != "-DOCSTART-"] == expected
    again = trainwright(*arguments, cwd=tmp_path)
    assert again.returncode != 0
    assert "exists already" in again.stderr


def test_a_chat_model_is_judged_and_writes(runs: Path, trainwright: Run) -> None:
    found = judged(trainwright, "sft-dolly", "--split", "validation", "--limit", "2", cwd=runs)
    assert 0 <= found["eos_rate"] <= 1
    done = trainwright("predict", "sft-dolly", str(SAMPLES / "chats.jsonl"), "--format", "auto", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len((SAMPLES / "chats.jsonl").read_text(encoding="utf-8").splitlines())


def lines_of(trainwright: Run, run: str, data: Path, *more: str, cwd: Path, **options: Any) -> list[dict[str, Any]]:
    done = trainwright("predict", run, str(data), "--format", "auto", *more, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return path


def test_questions_without_answers_are_answered(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "What is a cat?"}]}
    again = {"messages": [*asked["messages"], {"role": "assistant", "content": "?"}, {"role": "user", "content": "Go"}]}
    data = written(tmp_path / "问题" / "聊天.jsonl", asked, again)
    found = lines_of(trainwright, "sft-dolly", data, cwd=runs)
    assert [sorted(line) for line in found] == [["ended", "text", "tokens"]] * 2
    mixed = written(tmp_path / "问题" / "两.jsonl", again, {"messages": again["messages"][:2]})
    metrics = judged(trainwright, "sft-dolly", "--data", str(mixed), "--format", "auto", cwd=runs)
    assert 0 <= metrics["eos_rate"] <= 1, "the chat that ends with the user is passed over"


def test_labels_that_the_model_does_not_know_do_not_hinder_predictions(
    runs: Path, trainwright: Run, tmp_path: Path
) -> None:
    data = written(tmp_path / "数据" / "a.jsonl", {"text": "Who ?", "label": "NOPE"}, {"text": "哪年", "label": "HUM"})
    found = lines_of(trainwright, "trec", data, cwd=runs)
    assert [line["text"] for line in found] == ["Who ?", "哪年"]
    done = trainwright("eval", "trec", "--data", str(data), "--format", "auto", cwd=runs)
    assert done.returncode != 0
    assert "a.jsonl:1" in done.stderr
    assert "'NOPE' is none of the" in done.stderr


@pytest.mark.parametrize("name", ["trec", "sft-dolly"])
def test_an_exported_checkpoint_knows_its_task(runs: Path, tmp_path: Path, name: str) -> None:
    step = max(int(path.name.removeprefix("step-")) for path in (runs / name / "checkpoints").glob("step-*"))
    folder = export_run(runs / name, tmp_path / "out", step=step)
    for file in ("trainwright_task.json", "generation_config.json"):
        there = [place / file for place in (runs / name / "model", folder)]
        assert there[0].exists() == there[1].exists()
        if there[0].exists():
            assert json.loads(there[0].read_text(encoding="utf-8")) == json.loads(there[1].read_text(encoding="utf-8"))
    assert open_trained(folder).section.name == {"trec": "classification", "sft-dolly": "sft"}[name]


def test_what_cannot_be_judged_says_why(runs: Path, trainwright: Run, tmp_path: Path) -> None:
    questions = str(SAMPLES / "questions.txt")
    for arguments, reason in (
        (("eval", str(tmp_path)), "no finished model"),
        (("eval", str(runs / "conll2003"), "--split", "dev"), "no split 'dev'"),
        (("predict", str(runs / "trec"), str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("predict", str(runs / "trec"), "-", "--device", "gpu"), "no device 'gpu'"),
        (("eval", "trek"), "Did you mean 'trec'?"),
        (("predict", "trec", str(SAMPLES / "reviews.tsv")), "read as label_text, like the training data"),
        (("predict", "trec", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("predict", "trec", questions, "--out", "x", "--to", "conll"), "(labelled) is written as labelled, "),
    ):
        done = trainwright(*arguments, "--dir", str(runs), cwd=runs)
        assert done.returncode != 0
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
