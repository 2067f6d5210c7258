"""The contract of `initialize` and of the loop around it, on one process: DeepSpeed's shape, our checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainwright
from trainwright.base.errors import CheckpointError, ConfigError


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def model() -> Regression:
    torch.manual_seed(0)
    return Regression()


def rows(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return [(row, row.sum().reshape(1)) for row in x]


CONFIG: dict[str, Any] = {
    "batch": {"micro": 4, "accumulation": 2},
    "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0, "clip_norm": 1.0},
    "precision": "fp32",
}


def run(engine: Any, loader: Any, passes: int = 1) -> list[float]:
    found = []
    for _ in range(passes):
        for x, y in loader:
            loss = F.mse_loss(engine(x), y)
            engine.backward(loss)
            report = engine.step()
            if report is not None:
                found.append(float(report.loss))
    return found


def test_the_loop_of_the_docs_learns() -> None:
    engine, optimizer, loader, scheduler = trainwright.initialize(model=model(), config=CONFIG, training_data=rows())
    assert scheduler is None
    assert optimizer is engine.optimizer
    losses = run(engine, loader, passes=6)
    assert len(losses) == 6 * 64 // 8
    assert losses[-1] < losses[0] / 2
    assert engine.global_steps == 48
    assert engine.micro_steps == 96
    assert engine.global_samples == 48 * 8


def test_it_equals_a_plain_loop_with_torch_alone() -> None:
    reference = model()
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    engine = trainwright.initialize(model=model(), config=CONFIG).engine
    data = rows(32)
    for first in range(0, 32, 8):
        plain.zero_grad()
        for half in (data[first : first + 4], data[first + 4 : first + 8]):
            x, y = (torch.stack(column) for column in zip(*half, strict=True))
            (F.mse_loss(reference(x), y) / 2).backward()
            engine.backward(F.mse_loss(engine(x), y))
            engine.step()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
    for mine, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_step_does_nothing_between_boundaries() -> None:
    engine = trainwright.initialize(model=model(), config=CONFIG).engine
    before = engine.out.weight.clone()  # reached through the engine, as DeepSpeed's
    x = torch.ones(4, 4)
    assert not engine.is_gradient_accumulation_boundary()
    engine.backward(engine(x).sum())
    assert engine.step() is None
    assert torch.equal(engine.out.weight, before)
    assert engine.is_gradient_accumulation_boundary()
    engine.backward(engine(x).sum())
    assert engine.is_gradient_accumulation_boundary(), "between backward and step it speaks of the same micro-batch"
    assert engine.step() is not None
    assert engine.was_step_applied()
    assert not torch.equal(engine.out.weight, before)


def test_no_sync_and_set_boundary_override_the_count() -> None:
    engine = trainwright.initialize(model=model(), config=CONFIG).engine
    x = torch.ones(4, 4)
    with engine.no_sync():
        for _ in range(3):
            engine.backward(engine(x).sum())
            assert engine.step() is None
    assert engine.global_steps == 0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(x).sum())
    assert engine.step() is not None
    assert engine.global_steps == 1


def test_client_optimizer_and_scheduler_as_objects_and_as_callables() -> None:
    config = {"batch": {"micro": 4}, "precision": "fp32"}
    made = model()
    own = torch.optim.SGD(made.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(own, step_size=2, gamma=0.1)
    engine, optimizer, _, scheduler = trainwright.initialize(
        model=made, config=config, optimizer=own, lr_scheduler=schedule
    )
    assert optimizer is own
    assert scheduler is schedule
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 4)).sum())
        engine.step()
    assert engine.get_lr() == [pytest.approx(0.05)]

    engine, optimizer, _, scheduler = trainwright.initialize(
        model=model(),
        config=config,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, step_size=2, gamma=0.1),
    )
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 4)).sum())
        engine.step()
    assert engine.get_lr() == [pytest.approx(0.05)]


def test_a_deepspeed_configuration_is_understood() -> None:
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8},
        "bf16": {"enabled": False},
    }
    engine, _, loader, _ = trainwright.initialize(model=model(), config=config, training_data=rows())
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (8, 4)
    assert engine.gradient_accumulation_steps() == 2
    assert engine.gradient_clipping() == 1.0, "DeepSpeed's default since June 2026"
    losses = run(engine, loader)
    assert len(losses) == 8
    assert 0 < engine.get_lr()[0] <= 0.01
    assert any("reduce_bucket_size" in note.key for note in engine.loaded.notes)


def test_fp16_overflow_skips_counts_and_leaves_the_schedule_alone() -> None:
    config = {
        **CONFIG,
        "batch": {"micro": 4},
        "precision": {"name": "fp16", "initial_scale": 1024.0, "hysteresis": 1},
        "optim": {**CONFIG["optim"], "schedule": {"name": "constant", "warmup": "4 steps"}},
    }
    engine = trainwright.initialize(model=model(), config=config).engine
    x = torch.ones(4, 4)
    engine.backward(engine(x).sum())
    assert engine.step() is not None
    first = engine.get_lr()[0]
    before = engine.out.weight.clone()
    engine.backward(engine(x).sum() * float("inf"))
    report = engine.step()
    assert report is not None
    assert report.overflow
    assert report.loss_scale == 1024.0
    assert engine.loss_scale == 512.0
    assert engine.skipped_steps == 1
    assert not engine.was_step_applied()
    assert torch.equal(engine.out.weight, before)
    engine.backward(engine(x).sum())
    engine.step()
    assert engine.get_lr()[0] == pytest.approx(2 * first), "the skipped step did not advance the warm-up"


def test_gradient_release_equals_the_ordinary_step() -> None:
    config = {**CONFIG, "optim": {**CONFIG["optim"], "clip_norm": None}}
    ordinary = trainwright.initialize(model=model(), config=config).engine
    released = trainwright.initialize(model=model(), config={**config, "memory": {"release_gradients": True}}).engine
    data = rows(32)
    for engine in (ordinary, released):
        run(engine, [tuple(torch.stack(c) for c in zip(*data[i : i + 4], strict=True)) for i in range(0, 32, 4)])
    for a, b in zip(ordinary.module.parameters(), released.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert released.get_global_grad_norm() == pytest.approx(ordinary.get_global_grad_norm())


@pytest.mark.parametrize("client", [False, True])
def test_a_checkpoint_brings_everything_back(tmp_path: Path, client: bool) -> None:
    def build() -> Any:
        if not client:
            return trainwright.initialize(model=model(), config=CONFIG, training_data=rows())
        return trainwright.initialize(
            model=model(),
            config={"batch": CONFIG["batch"], "precision": "fp32"},
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            lr_scheduler=lambda made: torch.optim.lr_scheduler.ExponentialLR(made, 0.9),
            training_data=rows(),
        )

    engine, _, loader, _ = build()
    assert engine.load_checkpoint(tmp_path / "none") == (None, {})
    run(engine, loader)
    engine.save_checkpoint(tmp_path, client_state={"loader": loader.state_dict(), "名字": "回归"})
    expected = run(engine, loader)

    again, _, other, _ = build()
    path, client_state = again.load_checkpoint(tmp_path)
    assert path == tmp_path / "step-8"
    assert client_state["名字"] == "回归"
    other.load_state_dict(client_state["loader"])
    assert run(again, other) == expected
    with pytest.raises(CheckpointError, match="step-9 does not exist"):
        again.load_checkpoint(tmp_path, step=9)


def test_the_loader_goes_on_in_the_middle_of_a_pass() -> None:
    _, _, loader, _ = trainwright.initialize(model=model(), config=CONFIG, training_data=rows())
    assert loader is not None
    seen = []
    for index, (x, _) in enumerate(loader):
        seen.append(x)
        if index == 4:
            break
    state = loader.state_dict()
    _, _, fresh, _ = trainwright.initialize(model=model(), config=CONFIG, training_data=rows())
    assert fresh is not None
    fresh.load_state_dict(state)
    rest = [x for x, _ in fresh]
    assert len(seen) + len(rest) == len(loader)
    assert torch.cat([*seen, *rest]).unique(dim=0).shape[0] == 64, "no row lost or repeated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "bert-base"}, "expected a torch.nn.Module"),
        ({"config": {**CONFIG, "batch": {"micro": 4, "globel": 8}}}, "globel"),
        ({"config": {**CONFIG, "batch": {"global": 8, "micro": 3}}}, "batch"),
        ({"optimizer": lambda parameters: "sgd"}, "optimizer"),
        ({"lr_scheduler": lambda made: None}, "schedule already"),
        ({"model_parameters": [nn.Parameter(torch.ones(1))]}, "not the model's"),
        ({"training_data": iter([1])}, "without a length"),
        ({"config": {**CONFIG, "precision": "fp8"}}, "does not multiply fp8"),
        ({"config": {**CONFIG, "memory": {"parameters": "host"}}}, "nothing is divided"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_seen(arguments: dict[str, Any], message: str) -> None:
    if torch.cuda.is_available() and "fp8" in message:
        pytest.skip("this device multiplies fp8")
    with pytest.raises(ConfigError, match=message):
        trainwright.initialize(**{"model": model(), "config": CONFIG, **arguments})


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    made = model()
    own = torch.optim.Adam(made.parameters())
    made(torch.ones(1, 4)).sum().backward()
    own.step()
    with pytest.raises(ConfigError, match="has taken steps already"):
        trainwright.initialize(model=made, config={"batch": {"micro": 1}}, optimizer=own)


def test_two_engines_in_one_process_do_not_meet() -> None:
    first = trainwright.initialize(model=model(), config=CONFIG).engine
    second = trainwright.initialize(model=model(), config={**CONFIG, "batch": {"micro": 2}}).engine
    x = torch.ones(4, 4)
    second.backward(second(x).sum())
    second.step()
    assert (first.global_steps, second.global_steps) == (0, 1)
    first.destroy()
    second.backward(second(x).sum())
    second.step()
    assert second.global_steps == 2
