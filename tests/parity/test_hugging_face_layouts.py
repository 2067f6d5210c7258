"""Transformers models under ZeRO, tensor ranks and pipelines train as one process does; what cannot be divided says so.

fp32, clipped, AdamW with eps 1e-3, three steps of two micro-batches and an evaluation.
"""

from __future__ import annotations

from typing import Any

import pytest
from hugging_face_runs import train

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm import start
from trainwright.comm.layout import Layout, PipelineLayout
from trainwright.testing import run_ranks

pytest.importorskip("transformers")

TOLERANCE = 1e-6
LAYOUTS = {
    "zero-0": Layout(2, 0, 1),
    "zero-1": Layout(2, 1, 2),
    "zero-2": Layout(2, 2, 2, accumulate="sharded"),
    "zero-3": Layout(2, 3, 2, gather="micro_batch"),
    "tensor": Layout(2, 0, 1, tensor=2),
    "pipeline": Layout(2, 0, 1, pipeline=PipelineLayout(2)),
}
FULL: dict[str, Any] = {"recompute": "full"}
RUNS: list[tuple[str, str, dict[str, Any], bool]] = [
    # architecture, layout, memory, packed rows
    ("gemma", "zero-0", {}, False),
    ("gemma", "zero-3", FULL, True),
    ("deberta-v2", "zero-1", FULL, False),
    ("t5", "zero-2", {}, False),
    ("t5", "zero-3", FULL, False),
    ("bart", "zero-3", {}, False),
    ("phi", "tensor", {}, False),
    ("phi", "pipeline", {}, False),
]
REFUSED = [
    ("gemma", "tensor", "GemmaTextScaledWordEmbedding, whose own code"),
    ("gemma", "pipeline", "multiply their embedding inside the trunk"),
    ("bart", "tensor", "no tensor-parallel plan"),
    ("t5", "pipeline", "more than one list of blocks"),
]


def _worker(rank: int, world: int) -> list[Any]:
    ranks = start()
    found: list[Any] = [
        train(name, LAYOUTS[layout], ranks, memory=memory, packed=packed) for name, layout, memory, packed in RUNS
    ]
    for name, layout, _ in REFUSED:
        try:
            train(name, LAYOUTS[layout], ranks)
            found.append("nothing was refused")
        except (ConfigError, ModelError) as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def divided() -> list[list[Any]]:
    return run_ranks(_worker, 2, timeout=300)


def _alone(runs: dict[tuple[str, bool], dict[str, Any]], name: str, packed: bool) -> dict[str, Any]:
    if (name, packed) not in runs:
        runs[name, packed] = train(name, Layout(1, 0, 1), packed=packed)
    return runs[name, packed]


@pytest.mark.slow
def test_every_layout_trains_as_one_process_does(divided: list[list[Any]]) -> None:
    runs: dict[tuple[str, bool], dict[str, Any]] = {}
    for number, (name, layout, _, packed) in enumerate(RUNS):
        expected = _alone(runs, name, packed)
        for rank in divided:
            seen = rank[number]
            for key in ("losses", "norms"):
                for one, other in zip(seen[key], expected[key], strict=True):
                    assert one == pytest.approx(other, rel=TOLERANCE), (name, layout, key)
            for parameter, values in seen["parameters"].items():
                whole = expected["parameters"][parameter if parameter in expected["parameters"] else _tied(expected)]
                assert values == pytest.approx(whole, abs=TOLERANCE), (name, layout, parameter)
        told = divided[0][number]["evaluation"]
        assert told == pytest.approx(expected["evaluation"], rel=TOLERANCE), (name, layout)


def _tied(expected: dict[str, Any]) -> str:
    """A head on the last stage of a pipeline is the embedding of the first."""
    return next(name for name in expected["parameters"] if name.endswith("embed_tokens.weight"))


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_with_the_reason(divided: list[list[Any]]) -> None:
    for (name, layout, reason), message in zip(REFUSED, divided[0][len(RUNS) :], strict=True):
        assert reason in message, (name, layout, message)
