"""`data build` as users run it: several processes, killed without warning, twice at once, on real files."""

from __future__ import annotations

import gzip
import hashlib
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

import numpy as np
import pytest

from trainwright.base.errors import DataError
from trainwright.base.faults import FAULTS_VARIABLE
from trainwright.data import builder, commands, encoding
from trainwright.data.build import build_dataset, prepare_dataset
from trainwright.data.documents import SourceSpec
from trainwright.data.loader import Loader
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec
from trainwright.data.tokenizers import load_tokenizer
from trainwright.data.worker_pool import WorkerPool

PROGRAM = """
import sys
from trainwright.data import build, builder, writing
from trainwright.data.documents import SourceSpec
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec
builder.BATCH_CHARACTERS = 4000
builder.FEWEST_BYTES_PER_WORKER = 1
writing.COMMIT_SECONDS = 0.01
source, out, workers = sys.argv[1:]
spec = BuildSpec(
    (SourceSpec(source),), TrainTokenizer("bpe", 500), sequence_length=64, packing="best_fit",
    validation=ValidationSpec(fraction=0.1),
)
print("building", flush=True)
build.build_dataset(spec, out, int(workers))
"""


def start(source: Path, out: Path, workers: int, faults: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, FAULTS_VARIABLE: faults}
    if not faults:
        del environment[FAULTS_VARIABLE]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(source), str(out), str(workers)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, 600 documents, about 400 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": " ".join(f"word{n}" for n in rng.integers(0, 900, rng.integers(5, 200)))})
            for _ in range(300)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL at named points and at random times, with changing numbers of workers, until one life completes it."""
    assert finish(start(corpus, tmp_path / "undisturbed", 1)) == 0
    rng = random.Random(5)
    kills = 0
    plans = ["build.write:kill@hit=7", "build.before_commit:kill@hit=2", "build.after_commit:kill@hit=3", "", ""]
    for number, faults in enumerate([*plans, "build.before_rename:kill"]):
        process = start(corpus, tmp_path / "out", 1 + number % 3, faults)
        if not faults:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.6))
            process.kill()
        kills += finish(process) != 0
        if (tmp_path / "out").exists():
            break
    assert kills >= 3  # the named points always strike; a random moment may come after the end on a fast machine
    assert finish(start(corpus, tmp_path / "out", 2)) == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["out", "undisturbed"]


def test_two_builds_at_once_make_one_dataset(corpus: Path, tmp_path: Path) -> None:
    both = [start(corpus, tmp_path / "out", 1) for _ in range(2)]
    assert [finish(process) for process in both] == [0, 0]
    assert finish(start(corpus, tmp_path / "alone", 1)) == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


def test_workers_end_when_the_build_is_killed(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out", 2, "build.write:stop@hit=3")
    deadline = time.monotonic() + 60
    while not (workers := children(process.pid)) or state(process.pid) != "T":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{worker}").exists() and state(worker) != "Z" for worker in workers):
        assert time.monotonic() < deadline, "a tokenizing process outlived its build"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("this system does not list the children of a process")
    return [int(child) for child in path.read_text(encoding="utf-8").split()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]


def test_a_dead_worker_is_named_and_its_build_can_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "BATCH_CHARACTERS", 4000)
    monkeypatch.setattr(builder, "FEWEST_BYTES_PER_WORKER", 1)
    spec = BuildSpec((SourceSpec(str(corpus)),), TrainTokenizer("bpe", 500), sequence_length=64, validation=None)
    original = WorkerPool.submit
    submitted = 0

    def killing(self: WorkerPool, request: object) -> object:
        nonlocal submitted
        submitted += 1
        if submitted == 5:
            os.kill(self._workers[0].process.pid, signal.SIGKILL)
        return original(self, request)

    monkeypatch.setattr(WorkerPool, "submit", killing)
    with pytest.raises(DataError, match="a tokenizing process was killed by SIGKILL"):
        build_dataset(spec, tmp_path / "out", 2)
    build_dataset(spec, tmp_path / "out", 2)
    build_dataset(spec, tmp_path / "undisturbed", 1)
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")


def test_an_error_in_a_worker_reaches_the_user(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "FEWEST_BYTES_PER_WORKER", 1)
    spec = BuildSpec((SourceSpec(str(corpus)),), TrainTokenizer("bpe", 500), sequence_length=64, validation=None)
    original = encoding.WorkerPool

    def spoiling(*arguments: Any) -> WorkerPool:
        (path,) = tmp_path.rglob("tokenizer.json")
        value = json.loads(path.read_text(encoding="utf-8"))
        value["model"]["merges"].pop()
        path.write_text(json.dumps(value), encoding="utf-8")
        return original(*arguments)

    monkeypatch.setattr(encoding, "WorkerPool", spoiling)
    with pytest.raises(DataError, match=r"tokenizing failed: .*changed while it was in use"):
        build_dataset(spec, tmp_path / "out", 2)


def test_from_mixed_files_to_batches(tmp_path: Path) -> None:
    """A folder of several formats, one of them damaged, as a weighted mixture with Chinese text."""
    texts = tmp_path / "语料"
    texts.mkdir()
    for number in range(30):
        (texts / f"文{number:02d}.txt").write_text(
            f"第{number}篇文章。今天天气很好，我们去公园。\n" * 5, encoding="utf-8"
        )
    with gzip.open(tmp_path / "more.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(50):
            file.write(json.dumps({"body": f"english document number {number} with some words"}) + "\n")
        file.write("{broken\n")
    spec = BuildSpec(
        (
            SourceSpec(str(texts), weight=1.0, name="zh"),
            SourceSpec(str(tmp_path / "more.jsonl.gz"), weight=3.0, text_field="body", name="en"),
        ),
        TrainTokenizer("bpe", 400),
        sequence_length=32,
        packing="best_fit",
        weighted=True,
        on_error="skip",
        validation=ValidationSpec(fraction=0.2),
    )
    dataset = prepare_dataset(spec, tmp_path / "缓存", 2)
    assert sum(dataset.manifest.problems.values()) == 1
    assert [group.name for group in dataset.groups()] == ["zh", "en"]
    tokenizer = load_tokenizer(str(dataset.tokenizer_folder))
    with Loader(dataset, 8, seed=0) as loader:
        batches = [next(loader) for _ in range(25)]
    english = sum("document" in tokenizer.decode(row) for batch in batches for row in batch["input_ids"])
    assert english == 150
    for line in commands.inspect(dataset.folder):
        assert "�" not in line


def test_the_python_standard_library_becomes_a_dataset(tmp_path: Path) -> None:
    """The quickstart's corpus: whole files are held out."""
    spec = BuildSpec(
        (SourceSpec("python-stdlib"),), TrainTokenizer("bpe", 512), sequence_length=256, packing="best_fit"
    )  # fmt: skip
    dataset = prepare_dataset(spec, tmp_path / "cache")
    assert dataset.manifest.sources[0]["split"] == "hash"
    train, held = dataset.facts("train"), dataset.facts("validation")
    assert train.documents + held.documents > 300
    assert 0.02 < held.documents / (train.documents + held.documents) < 0.09
    assert train.padding_share(256) < 0.01
    assert prepare_dataset(spec, tmp_path / "cache").fingerprint == dataset.fingerprint


def test_instruction_text_packs_tightly(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = SourceSpec(str(shared_data("dolly_slice/dolly_first6400_instruction_response.jsonl")), text_field="output")
    padding = {}
    for packing in ("pad", "best_fit"):
        spec = BuildSpec((source,), TrainTokenizer("bpe", 1024), sequence_length=512, packing=packing, validation=None)
        dataset = prepare_dataset(spec, tmp_path / "cache", 1)
        padding[packing] = dataset.facts("train").padding_share(512)
    assert padding["pad"] > 0.5
    assert padding["best_fit"] < 0.005
