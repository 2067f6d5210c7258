"""A tiny real run: text on disk, a trained tokenizer, a two-layer model, a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Recipe = dict[str, Any]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small files of this Python's own standard library."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted((library / "asyncio").glob("*.py")) + sorted((library / "json").glob("*.py"))
    for number, path in enumerate(files[:40]):
        (folder / f"{number:02d}-{path.name}").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """`tiny(runs, name)` is a recipe that trains in a second or two; the dataset is built once."""
    cache = tmp_path_factory.mktemp("cache")

    def make(runs: Path, name: str = "tiny") -> Recipe:
        model = {"family": "llama", "hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
        return {
            "model": {"config": {**model, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}},
            "data": {
                "source": str(corpus),
                "tokenizer": {"train": "bpe", "vocab_size": 512},
                "sequence_length": 64,
                "validation": {"fraction": 0.1},
                "cache": str(cache),
            },
            "train": {
                "steps": 12,
                "batch_tokens": 512,
                "micro_batch": 4,
                "eval_every": "4 steps",
                "eval_tokens": 512,
                "compile": False,
                "threads": 1,
            },
            "optim": {"lr": 3e-3},
            "precision": "fp32",
            "checkpoint": {"every": "3 steps"},
            "monitor": {"console": "quiet", "tensorboard": False, "log_every": "1 steps"},
            "run": {"dir": str(runs), "name": name},
        }

    return make


@pytest.fixture
def trainwright() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: `trainwright("train", "recipe.yaml", env={...})`."""

    def run(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from trainwright.cli.main import run; run()", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", **(env or {})}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)

    return run
