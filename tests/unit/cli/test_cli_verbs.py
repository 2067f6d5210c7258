"""Every verb on a real, tiny run: trained once through the command line, then shown, verified, used and exported."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from trainwright.cli import main as cli
from trainwright.cli.doctor import DiskSpeed, Findings, find_problems, measure_disk

RECIPE = """\
model:
  config:
    {family: llama, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, head_dim: 16, intermediate_size: 64}
data:
  source: texts
  tokenizer: {train: bpe, vocab_size: 300}
  sequence_length: 32
  workers: 1
train: {steps: 4, batch_tokens: 128, eval_every: 2 steps, eval_tokens: 64, compile: false}
precision: fp32
monitor: {tensorboard: false}
checkpoint: {every: 2 steps, asynchronous: false}
run: {sample: {prompts: ["the"], max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a recipe and the run that `trainwright train` made of them."""
    folder = tmp_path_factory.mktemp("工作")
    (folder / "texts").mkdir()
    for number in range(12):
        text = f"document {number}: the quick brown fox 狐狸 jumps over {number} lazy dogs. " * 20
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "tiny.yaml", "train.seed=3", "--plain"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_a_language_model_is_judged_and_its_numbers_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    told = output(capsys, "eval", "tiny", "--split", "validation", "--out", "报告")
    assert "perplexity" in told
    assert told.endswith("written to 报告\n")
    stored = json.loads(Path("报告/validation.json").read_text(encoding="utf-8"))["metrics"]
    text = json.dumps({"text": "the quick brown fox 狐狸 " * 20}, ensure_ascii=False)
    Path("数据.jsonl").write_text(text + "\n", encoding="utf-8")
    printed = json.loads(output(capsys, "eval", "tiny", "--data", "数据.jsonl", "--out", "报告", "--json"))
    assert json.loads(Path("报告/数据.json").read_text(encoding="utf-8"))["metrics"]["loss"] == printed["loss"]
    assert set(stored) == {"loss", "perplexity"} == set(printed) - {"count"}
    run = json.loads(Path("runs/tiny/run.json").read_text(encoding="utf-8"))["result"]
    assert stored["loss"] == pytest.approx(run["validation_loss"], abs=0.5), "of the same rows, all of them"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--data", "texts/1.txt", "--split", "validation"), "is judged as a whole"),
        (("--format", "auto"), "--format says how a file is read, and none is given"),
        (("--column", "text=a"), "--column says how a file is read, and none is given"),
        (("--data", "texts/1.txt", "--format", "auto"), "causal_lm reads running text"),
        (("--data", "texts/1.txt", "--out", "tiny.yaml"), "--out tiny.yaml is a file"),
        (("--split", "dev"), "no split 'dev'"),
    ],
)
def test_options_of_eval_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    told = output(capsys, "eval", "tiny", *arguments, code=2)
    assert reason in told
    assert "  -> " in told


def test_the_run_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "finished" in output(capsys, "runs", "list")
    text = output(capsys, "runs", "show", "tiny")
    assert "4/4" in text
    assert "trainwright generate" in text


def test_print_config_says_where_every_value_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "train", "tiny.yaml", "train.seed=3", "--print-config").splitlines()
    origins = {line.split()[0]: line for line in lines}
    assert "override train.seed=3" in origins["train.seed"]
    assert "tiny.yaml:9" in origins["train.steps"]
    assert origins["optim.clip_norm"].endswith("default")
    assert "auto: " in origins["optim.lr"]
    assert not any(f"{key} " in origins and " auto " in origins[key] for key in ("optim.lr", "train.micro_batch"))


def test_dry_run_trains_nothing(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    before = sorted(path.name for path in (place / "runs").iterdir())
    text = output(capsys, "train", "tiny.yaml", "--dry-run")
    assert "4 steps" in text
    assert sorted(path.name for path in (place / "runs").iterdir()) == before


def test_resuming_a_finished_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = output(capsys, "train", "tiny.yaml", "train.seed=3", "--resume", "auto", code=2)
    assert "has finished" in message


def test_quiet_and_plain_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "exclude" in output(capsys, "train", "tiny.yaml", "--quiet", "--plain", code=2)


def test_checkpoints_are_listed_and_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert "complete" in output(capsys, "checkpoint", "list", "tiny")
    assert output(capsys, "checkpoint", "verify", "tiny").count(": good") == 2
    assert output(capsys, "checkpoint", "verify", "runs/tiny/checkpoints/step-4").count(": good") == 1


def test_a_flipped_bit_is_named_and_has_the_code_of_a_damaged_checkpoint(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "step-4"
    shutil.copytree(place / "runs" / "tiny" / "checkpoints" / "step-4", copy)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(copy)]) == 5
    captured = capsys.readouterr()
    assert largest.name in captured.out
    assert "1 of 1 checkpoints are damaged: step-4" in captured.err


def test_generate_streams_one_and_lists_many(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("--max-new-tokens", "8", "--seed", "1", "--temperature", "0.5")
    text = output(capsys, "generate", "tiny", "--prompt", "the 狐狸", *wanted)
    assert text.startswith("the 狐狸")
    lines = output(
        capsys, "generate", "runs/tiny", "--prompt", "the 狐狸", "--samples", "2", "--json", *wanted
    ).splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2
    assert first["prompt"] + first["text"] == text.removesuffix("\n")
    assert set(first) == {"prompt", "text", "prompt_tokens", "new_tokens", "finish_reason"}


def test_generate_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("lazy"))
    assert output(capsys, "generate", "tiny", "--max-new-tokens", "2").startswith("lazy")


def test_generate_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at" in output(capsys, "generate", "nothing", "--prompt", "x", code=4)


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no chat template" in output(capsys, "chat", "tiny", code=4)


def test_chat_with_a_template(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.main(["export", "tiny", str(tmp_path / "talker")]) == 0
    settings = tmp_path / "talker" / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    values["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    settings.write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\n\nhello\n/exit\nnever sent\n"))
    text = output(capsys, "chat", str(tmp_path / "talker"), "--max-new-tokens", "4", "--temperature", "0")
    assert len(text.splitlines()) >= 2


def test_export_makes_a_folder_that_stands_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    destination = tmp_path / "out"
    assert str(destination) in output(capsys, "export", "tiny", str(destination), "--step", "2")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in destination.iterdir()}
    assert "is not empty" in output(capsys, "export", "tiny", str(destination), code=2)


def test_data_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    built = tmp_path / "set"
    lines = output(capsys, "data", "build", "tiny.yaml", "--out", str(built)).splitlines()
    assert lines[0] == str(built)
    assert "every block matches" in output(capsys, "data", "inspect", str(built))
    shown = output(capsys, "data", "preview", str(built), "--rows", "2")
    assert shown.count("--- draw") == 2
    assert "狐狸" in shown or "fox" in shown
    assert output(capsys, "data", "preview", "tiny.yaml", "data.packing=pad", "--rows", "1").count("--- draw") == 1


def test_doctor_measures_and_advises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainwright.cli.doctor.measure_matmul_peak", lambda kind, dtype: 2e9)
    text = output(capsys, "doctor")
    for part in ("python", "torch", "matmul fp32", "2 GFLOP/s", "per fsync", "extra tensorboard"):
        assert part in text


def test_problems_and_advice() -> None:
    from trainwright.base.device import DeviceFacts, cpu_cores

    disk = DiskSpeed(0.001, 1e9, 10**12)
    facts = DeviceFacts("cpu", "x", 1, cpu_cores(), 2**34, True, "/usr/bin/g++", "2.13")
    good = Findings(facts, {"fp32": 1e11, "bf16": 2e11}, disk, threads=cpu_cores(), python_headers=True)
    assert find_problems(good) == []
    poor = DeviceFacts("cpu", "x", 1, cpu_cores(), 2**30, True, None, "2.13")
    bad = Findings(poor, {"fp32": 1e11, "bf16": 1e11}, DiskSpeed(0.5, 1e6, 10**9), threads=0, python_headers=False)
    text = " ".join(problem for problem, _ in find_problems(bad))
    for part in ("no C++ compiler", "bf16 is hardly", "torch uses 0", "memory", "free on disk", "fsync takes 500ms"):
        assert part in text


def test_the_disk_is_measured_where_the_runs_would_be(tmp_path: Path) -> None:
    speed = measure_disk(tmp_path / "not" / "there" / "yet")
    assert speed.bytes_per_second > 1e6
    assert 0 < speed.fsync_seconds < 10
    assert speed.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import trainwright

    assert trainwright.__version__ in output(capsys, "version")
