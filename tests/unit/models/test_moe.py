"""Layers of experts against a token-by-token definition; capacity, auxiliary loss, balancing by bias, statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.memory import apply_recompute
from trainwright.models import (
    MoEConfig,
    build_model,
    config_from_dict,
    count_active_parameters,
    count_flops,
    count_matmul_parameters,
    count_parameters,
    model_plan,
    preset,
)
from trainwright.models.moe.layer import MoE, kept_choices
from trainwright.models.moe.model import MoEForCausalLM
from trainwright.tasks import CausalLM
from trainwright.testing import tiny_moe_config

DEEPSEEK: dict[str, Any] = {
    "architecture": "dots1",
    "router_scores": "sigmoid",
    "qk_norm": True,
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_groups": 4,
    "groups_per_token": 2,
    "routed_scale": 2.5,
    "shared_size": 64,
}
QWEN2: dict[str, Any] = {"architecture": "qwen2_moe", "norm_topk": False, "shared_size": 48, "shared_gate": True}
KINDS: dict[str, dict[str, Any]] = {"mixtral": {}, "qwen2": QWEN2, "deepseek": DEEPSEEK}


def make(changes: dict[str, Any], seed: int = 3) -> MoEForCausalLM:
    model = build_model(MoEConfig(**tiny_moe_config(**{"initializer_range": 0.2, **changes})), seed=seed)
    assert isinstance(model, MoEForCausalLM)
    return model.train()


def rows(count: int = 3, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def by_token(moe: MoE, token: Tensor, bias: Tensor | None) -> tuple[Tensor, list[int]]:
    """The layer's output for one token [D], and its experts: written from the papers' formulas with plain loops."""
    config = moe.config
    logits = [float(row @ token) for row in moe.gate.weight.double()]
    if config.router_scores == "softmax":
        whole = sum(math.exp(value) for value in logits)
        scores = [math.exp(value) / whole for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    wanted = [score + (0.0 if bias is None else float(bias[e])) for e, score in enumerate(scores)]
    size = config.num_experts // config.expert_groups
    groups = [sum(sorted(wanted[g * size : (g + 1) * size])[-2:]) for g in range(config.expert_groups)]
    best = sorted(range(len(groups)), key=lambda g: -groups[g])[: config.groups_per_token]
    allowed = [e for e in range(config.num_experts) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -wanted[e])[: config.experts_per_token]
    total = sum(scores[e] for e in chosen) if config.norm_topk else 1.0
    out = torch.zeros_like(token)
    for e in chosen:
        gate, up, down = (getattr(moe.experts, f"{name}_proj")[e].double() for name in ("gate", "up", "down"))
        out = out + scores[e] / total * config.routed_scale * (down @ (F.silu(gate @ token) * (up @ token)))
    if config.shared_size:
        shared = moe.shared_expert.double()(token)
        moe.shared_expert.float()
        if config.shared_gate:
            shared = torch.sigmoid(moe.shared_expert_gate.weight.double() @ token) * shared
        out = out + shared
    return out, chosen


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layer_is_the_sum_over_chosen_experts_of_each_token(kind: str) -> None:
    moe = make(KINDS[kind]).moe_layers()[0].eval()
    bias = moe.gate.e_score_correction_bias
    if bias is not None:
        bias.copy_(torch.linspace(-0.3, 0.3, 8)[torch.randperm(8, generator=torch.Generator().manual_seed(1))])
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4))
    found, experts = moe(x), moe.gate(x.flatten(0, 1)).experts
    for index, token in enumerate(x.flatten(0, 1).double()):
        expected, chosen = by_token(moe, token, bias)
        assert sorted(experts[index].tolist()) == sorted(chosen)
        torch.testing.assert_close(found.flatten(0, 1)[index].double(), expected, rtol=1e-5, atol=1e-5)


def test_room_is_counted_by_row_and_earlier_tokens_come_first() -> None:
    config = MoEConfig(**tiny_moe_config(num_experts=2, experts_per_token=1, capacity_factor=1.0))
    # 4 choices over 2 experts at factor 1: room for 2 in each row
    assert kept_choices(torch.tensor([[0, 0, 0, 1], [1, 0, 1, 0]]), config).tolist() == [
        [True, True, False, True],
        [True, True, True, True],
    ]
    wide = MoEConfig(**tiny_moe_config(num_experts=2, experts_per_token=1, capacity_factor=1.2))
    assert kept_choices(torch.tensor([[0, 0, 0, 0]]), wide).tolist() == [[True, True, True, False]]


def test_dropped_tokens_get_only_the_residual_and_are_counted() -> None:
    model = make({"capacity_factor": 0.5})
    moe = model.moe_layers()[0]
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(4))
    out = moe(x)
    routing = moe.gate(x.flatten(0, 1))
    kept = kept_choices(routing.experts.view(2, -1), moe.config).view_as(routing.experts)
    lost = ~kept.any(-1)
    assert 0 < lost.sum() < 20
    assert torch.equal(out.flatten(0, 1)[lost], torch.zeros(int(lost.sum()), 64))
    assert out.flatten(0, 1)[~lost].abs().amax(-1).min() > 0
    loads = model.take_loads()
    assert loads is not None
    assert loads[0].tolist() == [*torch.bincount(routing.experts.flatten(), minlength=4).tolist(), int((~kept).sum())]
    full = moe.eval()(x)
    assert not torch.equal(full, out), "nothing is dropped in evaluation"
    assert full.flatten(0, 1).abs().amax(-1).min() > 0


def test_with_room_for_all_nothing_changes() -> None:
    x = rows()
    assert torch.equal(make({})(x), make({"capacity_factor": 4.0})(x))


def test_what_becomes_of_a_token_does_not_depend_on_later_ones_or_other_rows() -> None:
    model = make({"capacity_factor": 0.5})
    moe = model.moe_layers()[0]
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(4))
    changed = x.clone()
    changed[0, 7:] = -x[0, 7:]
    changed[1] = x[1].flip(0)
    # The room is a matter of the row's length, not of what is in it.
    assert torch.equal(moe(x)[0, :7], moe(changed)[0, :7])


def test_auxiliary_loss_is_that_of_transformers_for_one_row_and_layer() -> None:
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = make({"num_layers": 3, "auxiliary_weight": 0.25})
    x = rows(count=1, length=20)
    labels = x.clone()
    labels[0, :7] = -100
    logits: list[Tensor] = []
    handles = [
        moe.gate.register_forward_hook(
            lambda module, inputs, output: logits.append(F.linear(inputs[0], module.weight).detach())
        )
        for moe in model.moe_layers()
    ]
    model(x)
    found = model.auxiliary_loss(labels)
    for handle in handles:
        handle.remove()
    each = [float(load_balancing_loss_func((layer,), 4, 2)) for layer in logits]
    assert found is not None
    assert found.item() == pytest.approx(0.25 * 13 * sum(each) / 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_how_they_are_dealt(kind: str) -> None:
    """Loss and gradients of a batch are the sums of those of its rows, the auxiliary loss included."""
    x = rows(count=4)
    labels = x.roll(-1, 1)
    labels[1, 3:] = -100
    together, apart = make(KINDS[kind]), make(KINDS[kind])
    loss = CausalLM().loss(together, {"input_ids": x, "labels": labels}).loss_sum
    loss.backward()
    total = 0.0
    for row in range(4):
        part = CausalLM().loss(apart, {"input_ids": x[row : row + 1], "labels": labels[row : row + 1]}).loss_sum
        part.backward()
        total += float(part)
    assert float(loss) == pytest.approx(total, rel=1e-6)
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(together.take_loads(), apart.take_loads())


def test_evaluation_is_without_auxiliary_loss_and_leaves_no_trace() -> None:
    model = make({})
    batch = {"input_ids": rows(), "labels": rows(seed=2)}
    with torch.no_grad():
        evaluated = CausalLM().evaluate(model, batch).loss_sum
    assert model.auxiliary_loss(batch["labels"]) is None
    assert int(model.take_loads().sum()) == 0
    trained = CausalLM().loss(model, batch).loss_sum
    CausalLM().loss(model, batch)
    assert float(trained - evaluated) == pytest.approx(0.01 * 36 * 2, rel=0.25)  # 2 is what equal loads give: k
    assert int(model.take_loads().sum()) == 2 * 2 * 36 * 2


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_changes_neither_gradients_nor_counts(policy: str) -> None:
    plain, recomputed = make(DEEPSEEK), make(DEEPSEEK)
    apply_recompute(recomputed, policy)
    batch = {"input_ids": rows(), "labels": rows(seed=2)}
    for model in (plain, recomputed):
        CausalLM().loss(model, batch).loss_sum.backward()
        assert all(not moe.record.parts for moe in model.moe_layers())
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(plain.take_loads(), recomputed.take_loads())


def test_compiled_blocks_compute_the_same() -> None:
    plain, compiled = make(QWEN2), make(QWEN2)
    for block in compiled.blocks.children():
        block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager")
    batch = {"input_ids": rows(), "labels": rows(seed=2)}
    for model in (plain, compiled):
        CausalLM().loss(model, batch).loss_sum.backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert torch.equal(plain.take_loads(), compiled.take_loads())


def test_bias_moves_toward_equal_loads_and_is_part_of_the_state() -> None:
    model = make({**DEEPSEEK, "bias_rate": 0.01})
    loads = torch.tensor([[10, 0, 5, 5, 5, 5, 5, 5, 0]] * 2)
    model.update_balance(loads)
    for moe in model.moe_layers():
        assert moe.gate.e_score_correction_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0, 0, 0, 0])
    state = model.state_dict()
    assert "model.layers.0.mlp.gate.e_score_correction_bias" in state
    assert "model.layers.0.mlp.gate.e_score_correction_bias" not in dict(model.named_parameters())
    again = make({**DEEPSEEK, "bias_rate": 0.01}, seed=8)
    again.load_state_dict(state)
    assert torch.equal(again(rows()), model(rows()))
    assert make(DEEPSEEK).bfloat16().moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32


def imbalance_after(steps: int, **changes: Any) -> tuple[float, float]:
    """Imbalance before and after training on rows of a skewed language."""
    groups = {"expert_groups": 1, "groups_per_token": 1, "experts_per_token": 2}
    model = make({**DEEPSEEK, **groups, "auxiliary_weight": 0.0, **changes})
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(steps):
        x = (torch.randn(8, 33, generator=generator).abs() * 20).long() % 256
        loss = CausalLM().loss(model, {"input_ids": x[:, :-1], "labels": x[:, 1:]})
        (loss.loss_sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads = model.take_loads()
        assert loads is not None
        model.update_balance(loads)
        seen.append(model.load_statistics()["moe/imbalance_max"])
    return sum(seen[:3]) / 3, sum(seen[-5:]) / 5


def test_balancing_drives_the_imbalance_down() -> None:
    before, alone = imbalance_after(60)
    _, by_bias = imbalance_after(60, bias_rate=0.02)
    _, by_loss = imbalance_after(60, auxiliary_weight=0.3)
    # 4 is the most that is possible: all tokens go to the same 2 of 8 experts. Few words in a batch of 256 tokens
    # leave some imbalance whatever is done.
    assert before == pytest.approx(1.8, rel=0.1)
    assert alone > 3.5
    assert by_bias < 2.0
    assert by_loss < 2.0


def test_statistics_are_plain_numbers_and_reset() -> None:
    model = make({})
    model.update_balance(torch.tensor([[6, 2, 0, 0, 1], [2, 2, 2, 2, 0]]))
    numbers = model.load_statistics()
    assert numbers == {
        "moe/imbalance": 2.0,
        "moe/imbalance_max": 3.0,
        "moe/idle_experts": 0.25,
        "moe/dropped": 1 / 16,
        "moe/layer_0/imbalance": 3.0,
        "moe/layer_0/load_max": 0.75,
        "moe/layer_1/imbalance": 1.0,
        "moe/layer_1/load_max": 0.25,
    }
    assert model.load_statistics() == {}


def test_half_precision_trains_in_it() -> None:
    model = make(DEEPSEEK)
    batch = {"input_ids": rows(), "labels": rows(seed=2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = CausalLM().loss(model, batch).loss_sum
    half.backward()
    full = CausalLM().loss(model, batch).loss_sum
    assert float(half) == pytest.approx(float(full), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_counts_of_published_models() -> None:
    mixtral, qwen = preset("mixtral-8x7b"), preset("qwen3-30b-a3b")
    assert count_parameters(mixtral) == 46_702_792_704
    assert count_active_parameters(mixtral) == 12_879_925_248
    assert count_parameters(qwen) == 30_532_122_624
    assert count_active_parameters(qwen) == 3_353_032_704
    tiny = MoEConfig(**tiny_moe_config())
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 4 * 64 + 2 * 3 * 64 * 64  # attention, router, two experts
    assert count_matmul_parameters(tiny) == 2 * per_layer + 256 * 64
    assert count_flops(tiny, 1) == 6 * count_matmul_parameters(tiny) + 2 * 12 * 64


def test_every_preset_is_built_and_read_back() -> None:
    for name in ("moe-tiny", "moe-8m", "moe-60m", "moe-deepseek-60m", "mixtral-8x7b", "qwen3-30b-a3b"):
        config = preset(name)
        assert config_from_dict(config.to_hf()) == config
        model = build_model(config, device="meta")
        assert len(model.moe_layers()) == config.num_layers - len(config.dense_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_names_the_linears_of_every_block(kind: str) -> None:
    model = make({**KINDS[kind], "dense_layers": () if kind == "mixtral" else (0,)})
    planned = {linear.name for linear in model_plan(model.config).linears}
    seen = {
        name
        for block in model.blocks.children()
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert planned == seen - {"mlp.shared_expert_gate"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 5}, "can reach 4 experts"),
        ({"expert_groups": 3, **{k: v for k, v in DEEPSEEK.items() if k != "expert_groups"}}, "does not divide"),
        ({"bias_rate": 0.1}, "cannot have bias_rate"),
        ({"router_scores": "sigmoid"}, "cannot have router_scores"),
        ({"dense_layers": (0, 1), **QWEN2}, "every layer is dense"),
        ({"dense_layers": (2,), **QWEN2}, "ascending layers below 2"),
        ({**QWEN2, "shared_size": 0}, "shared_size is 0"),
        ({**DEEPSEEK, "dense_layers": (1,)}, "cannot have dense_layers"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"architecture": "mistral"}, "expected one of mixtral"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        MoEConfig(**tiny_moe_config(**changes))
