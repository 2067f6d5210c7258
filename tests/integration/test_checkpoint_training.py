"""Saving, in the background or not, changes no bit of training, and a resumed run is the run that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from trainwright.checkpoint import Checkpointer

STEPS = 12


class Run:
    """A model with dropout under AdamW, so that parameters, moments and the random state all matter."""

    def __init__(self, device: str = "cpu") -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, 64)]
        self.model = torch.nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.losses: list[float] = []
        self.device = device

    def step(self, index: int) -> None:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(index)).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(x) - x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def state_dict(self) -> dict[str, Any]:
        random_state = {"cpu": torch.get_rng_state()}
        if self.device == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state,
            "losses": {"all": list(self.losses)},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"])
        self.losses = list(state["losses"]["all"])


def undisturbed(device: str = "cpu") -> Run:
    run = Run(device)
    for index in range(STEPS):
        run.step(index)
    return run


def equal(one: Run, other: Run) -> bool:
    return one.losses == other.losses and all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_saving_every_step_changes_no_bit_of_training(
    tmp_path: Path, mode: Literal["synchronous", "asynchronous"]
) -> None:
    run = Run()
    with Checkpointer(tmp_path, asynchronous=mode == "asynchronous") as checkpointer:
        for index in range(STEPS):
            run.step(index)
            checkpointer.save(index + 1, run.state_dict())
    assert equal(run, undisturbed())


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_resuming_from_any_step_gives_the_same_run(tmp_path: Path, asynchronous: bool, device: str) -> None:
    first = Run(device)
    with Checkpointer(tmp_path, keep=None, asynchronous=asynchronous) as checkpointer:
        for index in range(STEPS):
            first.step(index)  # goes on at once, while an asynchronous save is still being written
            checkpointer.save(index + 1, first.state_dict(), {"next": index + 1})
    for step in (1, 7, STEPS - 1):
        torch.manual_seed(99)
        resumed = Run(device)
        with Checkpointer(tmp_path) as checkpointer:
            state, meta = checkpointer.load(tmp_path / f"step-{step}")
        resumed.load(state)
        for index in range(meta["next"], STEPS):
            resumed.step(index)
        assert equal(resumed, undisturbed(device))
