"""Each optimizer against a reference, one object for all of them, and state that resumes bit by bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.optim import GroupedOptimizer, OptimizerOptions, Rule, build_optimizer
from trainwright.optim.muon import newton_schulz, update_scale
from trainwright.optim.options import NAMES


class Small(nn.Module):
    """Has every kind of parameter: embedding, hidden matrices wide and tall, a norm, biases, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 8, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embed_tokens(ids)))))


def small(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(3)
    return Small().to(dtype)


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step()


def assert_same(left: nn.Module, right: nn.Module, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def options(name: str, **changes: object) -> OptimizerOptions:
    return OptimizerOptions(name=name, lr=0.01, **changes)  # type: ignore[arg-type]


# A rule that gives every parameter the same decay, for comparison with torch's optimizers, which know no groups.
EVERYWHERE = (Rule(".", weight_decay=0.1),)

REFERENCES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_fused_optimizers_equal_torch_bit_by_bit(name: str) -> None:
    mine, other = small(), small()
    train(mine, build_optimizer(mine.named_parameters(), options(name, rules=EVERYWHERE)), range(20))
    train(other, REFERENCES[name](list(other.parameters())), range(20))
    assert_same(mine, other)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_unfused_is_the_same_within_rounding(name: str) -> None:
    fused, plain = small(), small()
    train(fused, build_optimizer(fused.named_parameters(), options(name)), range(20))
    train(plain, build_optimizer(plain.named_parameters(), options(name, fused=False)), range(20))
    assert_same(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, True)])
def test_sgd_variants_equal_torch(momentum: float, nesterov: bool) -> None:
    mine, other = small(), small()
    chosen = options("sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.0)
    train(mine, build_optimizer(mine.named_parameters(), chosen), range(10))
    reference = torch.optim.SGD(other.parameters(), lr=0.01, momentum=momentum, nesterov=nesterov, fused=True)
    train(other, reference, range(10))
    assert_same(mine, other)


def test_adafactor_equals_torch() -> None:
    mine, other = small(), small()
    train(mine, build_optimizer(mine.named_parameters(), options("adafactor", rules=EVERYWHERE)), range(20))
    train(other, torch.optim.Adafactor(other.parameters(), lr=0.01, weight_decay=0.1), range(20))
    assert_same(mine, other, rtol=1e-5, atol=1e-7)


def test_adafactor_state_is_rows_and_columns() -> None:
    model = small()
    optimizer = build_optimizer(model.named_parameters(), options("adafactor"))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()["parameters"]["up.weight"]
    assert sum(t.numel() for key, t in state.items() if key != "step") == 16 + 8


def lion_reference(weights: list[Tensor], steps: int, lr: float, decay: float, b1: float, b2: float) -> None:
    """Algorithm 2 of 2302.06675, line by line."""
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for i, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=generator)
            update = torch.sign(b1 * momenta[i] + (1 - b1) * grad)
            weight.copy_(weight - lr * (update + decay * weight))
            momenta[i] = b2 * momenta[i] + (1 - b2) * grad


def test_lion_equals_the_paper() -> None:
    mine = small()
    reference = [p.detach().clone() for p in mine.parameters()]
    train(mine, build_optimizer(mine.named_parameters(), options("lion", rules=EVERYWHERE)), range(20))
    lion_reference(reference, 20, 0.01, 0.1, 0.9, 0.99)
    for a, b in zip(mine.parameters(), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torch_for_matrices_and_adamw_for_the_rest(adjust: str) -> None:
    mine, other = small(), small()
    chosen = options("muon", lr_adjust=adjust, newton_schulz_dtype="bfloat16", rules=EVERYWHERE)
    train(mine, build_optimizer(mine.named_parameters(), chosen), range(10))
    matrices = [other.up.weight, other.down.weight]
    rest = [p for p in other.parameters() if all(p is not m for m in matrices)]
    references = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]
    for step in range(10):
        set_grads(other, step)
        for reference in references:
            reference.step()
    # bf16 has 8 bits; the two write the same iteration with roundings at other places.
    assert_same(mine, other, rtol=0.02, atol=0.01)
    torch.testing.assert_close(mine.lm_head.weight, other.lm_head.weight, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (5, 16, 24)])
def test_newton_schulz_is_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag_embed(s.clamp(min=0.1 * float(s.max()))) @ vt  # no direction lost in the noise
    result = newton_schulz(matrix, dtype=torch.float64)
    values = torch.linalg.svdvals(result)
    # Keller Jordan's coefficients trade exactness for speed: every singular value lands near 1, not at it.
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    # and the singular directions are those of the input: the result is U f(S) V^T.
    aligned = u.mT @ result @ vt.mT
    off_diagonal = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-9


def test_newton_schulz_survives_a_zero_gradient() -> None:
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_muon_batches_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainwright.optim import muon

    torch.manual_seed(1)
    stacked = torch.randn(3, 8, 12)
    each = torch.stack([newton_schulz(matrix) for matrix in stacked])
    torch.testing.assert_close(newton_schulz(stacked), each, rtol=1e-5, atol=1e-6)

    def run() -> list[Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
        train(
            model, build_optimizer(model.named_parameters(), options("muon", newton_schulz_dtype="float32")), range(3)
        )
        return [p.detach() for p in model.parameters()]

    alone = run()
    monkeypatch.setattr(muon, "_batches", lambda params: [[0, 1], [2]])
    for a, b in zip(alone, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_update_has_the_size_of_adamws() -> None:
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        update = newton_schulz(torch.randn(shape)) * update_scale(*shape, "match_rms_adamw")
        assert 0.15 < float(update.square().mean().sqrt()) < 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_through_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    undisturbed = small(dtype)
    train(undisturbed, build_optimizer(undisturbed.named_parameters(), options(name)), range(12))

    first = small(dtype)
    optimizer = build_optimizer(first.named_parameters(), options(name))
    train(first, optimizer, range(6))
    saved = optimizer.state_dict()
    flat = {f"{p}|{key}": t.clone() for p, state in saved["parameters"].items() for key, t in state.items()}
    save_file(flat, tmp_path / "state.safetensors")
    (tmp_path / "settings.json").write_text(json.dumps(saved["settings"]), encoding="utf-8")

    second = Small().to(dtype)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second.named_parameters(), options(name))
    parameters: dict[str, dict[str, Tensor]] = {p: {} for p in saved["parameters"]}
    for key, tensor in load_file(tmp_path / "state.safetensors").items():
        parameter, _, entry = key.partition("|")
        parameters[parameter][entry] = tensor
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    resumed.load_state_dict({"parameters": parameters, "settings": settings})
    train(second, resumed, range(6, 12))
    assert_same(undisturbed, second)


def test_states_of_versions_that_saved_groups_are_loaded() -> None:
    first = small()
    optimizer = build_optimizer(first.named_parameters(), options("adamw"))
    train(first, optimizer, range(3))
    new = optimizer.state_dict()
    groups = [
        {"algorithm": "adamw", "lr": 0.25 + i, "names": list(group["param_names"])}
        for i, group in enumerate(optimizer.param_groups)
    ]
    old = {"parameters": new["parameters"], "groups": groups, "steps": 3}
    resumed = build_optimizer(small().named_parameters(), options("adamw"))
    resumed.load_state_dict(old)
    assert [group["lr"] for group in resumed.param_groups] == [0.25 + i for i in range(len(groups))]
    assert resumed.steps == 3
    # A rank of a pipeline has some of the parameters, and gets their state alone, but the groups of all.
    some = dict(list(small().named_parameters())[:2])
    part = build_optimizer(some.items(), options("adamw"))
    part.load_state_dict({**old, "parameters": {name: new["parameters"][name] for name in some}})
    assert all(torch.equal(part.state[p]["exp_avg"], new["parameters"][name]["exp_avg"]) for name, p in some.items())
    with pytest.raises(CheckpointError, match="1 missing from the checkpoint"):
        build_optimizer([*some.items(), ("w", nn.Parameter(torch.ones(2)))], options("adamw")).load_state_dict(old)
    with pytest.raises(CheckpointError, match="not trained by this run"):
        part.load_state_dict(old)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name: str) -> None:
    torch.manual_seed(0)
    model = small()
    inputs = torch.arange(11)
    targets = (inputs * 3) % 11
    lr = {"sgd": 0.1, "lion": 0.003, "adafactor": 0.03}.get(name, 0.01)
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(name=name, lr=lr, weight_decay=0.0))
    loss = torch.tensor(math.inf)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5, f"{name} ends at {loss.item():.3f}; log(11) = 2.398 is guessing"


@pytest.mark.parametrize("name", NAMES)
def test_gradient_factor_equals_scaled_gradients(name: str) -> None:
    folded, scaled = small(), small()
    a = build_optimizer(folded.named_parameters(), options(name, newton_schulz_dtype="float32"))
    b = build_optimizer(scaled.named_parameters(), options(name, newton_schulz_dtype="float32"))
    for step in range(5):
        set_grads(folded, step)
        a.step(gradient_factor=0.037)
        set_grads(scaled, step, scale=0.037)
        b.step()
    # Muon orthogonalises: it turns roundings of small directions into visible ones.
    assert_same(folded, scaled, rtol=1e-4, atol=1e-5)


def test_gradient_factor_leaves_scaled_gradients_behind() -> None:
    model = small()
    optimizer = build_optimizer(model.named_parameters(), options("adamw"))
    set_grads(model, 0)
    before = model.up.weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step(gradient_factor=torch.tensor(0.5))
    torch.testing.assert_close(model.up.weight.grad, before * 0.5)


def test_bf16_parameters_gather_small_updates_in_fp32() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = build_optimizer([("weight", weight)], OptimizerOptions(name="sgd", lr=1e-3, momentum=0.0))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # One step of 0.001 is below the spacing of bf16 at 1 (1/128): without the fp32 copy nothing would ever move.
    torch.testing.assert_close(weight, torch.full_like(weight, 0.9))
    assert optimizer.state_dict()["parameters"]["weight"]["master"].dtype == torch.float32


def test_set_lr_scales_every_groups_peak() -> None:
    model = small()
    rules = (Rule("up", lr_scale=0.5),)
    optimizer = build_optimizer(model.named_parameters(), options("adamw", rules=rules))
    for multiplier in (0.1, 1.0, 0.3):
        optimizer.set_lr(multiplier)
        assert {round(g["lr"] / multiplier, 6) for g in optimizer.param_groups} == {0.01, 0.005}


def test_closure_and_torch_scheduler_work() -> None:
    model = small()
    optimizer = build_optimizer(model.named_parameters(), options("adamw"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(11)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_late_first_gradient_resumes_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    """`up.weight` has its first gradient after the run was saved: its state is then as fresh as without the save."""

    def run(model: Small, optimizer: GroupedOptimizer, steps: range) -> None:
        for step in steps:
            set_grads(model, step)
            if step < 5:
                model.up.weight.grad = None
            optimizer.step()

    undisturbed, first, second = small(dtype), small(dtype), Small().to(dtype)
    run(undisturbed, build_optimizer(undisturbed.named_parameters(), options(name)), range(8))
    before = first.up.weight.detach().clone()
    optimizer = build_optimizer(first.named_parameters(), options(name))
    run(first, optimizer, range(3))
    assert torch.equal(first.up.weight, before)
    saved = optimizer.state_dict()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second.named_parameters(), options(name))
    resumed.load_state_dict(saved)
    assert resumed.steps == 3
    run(second, resumed, range(3, 8))
    assert_same(undisturbed, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_before_the_first_step_has_the_form_of_any_later_one(name: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    optimizer = build_optimizer(model.named_parameters(), options(name))
    untouched = build_optimizer(small(dtype).named_parameters(), options(name)).state_dict()
    train(model, optimizer, range(2))
    trained = optimizer.state_dict()
    for parameter, state in trained["parameters"].items():
        fresh = untouched["parameters"][parameter]
        assert {k: (t.shape, t.dtype) for k, t in state.items()} == {k: (t.shape, t.dtype) for k, t in fresh.items()}


def test_parts_of_a_step_are_the_step() -> None:
    whole, parts = small(), small()
    one = build_optimizer(whole.named_parameters(), options("adamw"))
    other = build_optimizer(parts.named_parameters(), options("adamw"))
    for step in range(4):
        set_grads(whole, step)
        one.step(gradient_factor=0.5)
        set_grads(parts, step)
        other.begin_step()
        for parameter in reversed(list(parts.parameters())):
            other.step_part([parameter], gradient_factor=0.5)
    assert_same(whole, parts)
    assert other.steps == one.steps == 4


def test_state_without_entries_of_earlier_versions_starts_afresh() -> None:
    _, optimizer = _saved("adamw")
    state = optimizer.state_dict()
    state["parameters"]["up.weight"] = {}
    fresh = build_optimizer(small().named_parameters(), options("adamw"))
    fresh.load_state_dict(state)
    assert fresh.state_dict()["parameters"]["up.weight"]["step"].item() == 0
    assert fresh.state_dict()["parameters"]["down.weight"]["step"].item() == 2


def test_state_of_another_type_is_refused() -> None:
    _, optimizer = _saved("adamw")
    state = optimizer.state_dict()
    state["parameters"]["up.weight"]["exp_avg"] = torch.zeros(16, 8, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"exp_avg of up\.weight is torch\.float64, expected torch\.float32"):
        optimizer.load_state_dict(state)


def _saved(name: str) -> tuple[Small, GroupedOptimizer]:
    model = small()
    optimizer = build_optimizer(model.named_parameters(), options(name))
    train(model, optimizer, range(2))
    return model, optimizer


def test_state_of_another_algorithm_is_refused_and_nothing_changes() -> None:
    _, adamw = _saved("adamw")
    _, lion = _saved("lion")
    before = {k: v.clone() for k, v in lion.state_dict()["parameters"]["up.weight"].items()}
    with pytest.raises(CheckpointError, match="made by adamw, this run uses lion"):
        lion.load_state_dict(adamw.state_dict())
    assert torch.equal(lion.state_dict()["parameters"]["up.weight"]["exp_avg"], before["exp_avg"])


def test_state_of_another_model_is_refused_by_name() -> None:
    _, optimizer = _saved("adamw")
    model = nn.Sequential(nn.Linear(3, 3))
    other = build_optimizer(model.named_parameters(), options("adamw"))
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        other.load_state_dict(optimizer.state_dict())


def test_state_of_another_shape_is_refused() -> None:
    _, optimizer = _saved("adamw")
    state = optimizer.state_dict()
    state["parameters"]["up.weight"]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"exp_avg of up\.weight has shape \[2, 2\], expected \[16, 8\]"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "unknown optimizer 'adam'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
        ({"lr_adjust": "other"}, "lr_adjust is 'other'"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps is 0"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerOptions(**changes)  # type: ignore[arg-type]
