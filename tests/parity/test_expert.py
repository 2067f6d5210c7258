"""Experts divided over ranks compute the training of one process: losses, gradients, 20 steps, in fp32 to 1e-5.

Each rank also computes the whole batch alone, so that gradients are compared where they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.comm import start
from trainwright.comm.layout import Layout
from trainwright.comm.mesh import Mesh, make_mesh
from trainwright.models import MoEConfig, build_model
from trainwright.models.moe.model import MoEForCausalLM
from trainwright.parallel import apply_zero
from trainwright.parallel.context import apply_context, cut_batch
from trainwright.parallel.expert import apply_expert, expert_modules
from trainwright.parallel.expert.exchange import run_at_experts
from trainwright.parallel.tensor import apply_tensor
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_moe_config

STEPS = 20
ROWS, LENGTH = 8, 16
LIMIT = 1e-5

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-capacity": {"capacity_factor": 0.8},
    "mixtral-few": {"num_experts": 2, "experts_per_token": 1},
    "qwen2": {
        "architecture": "qwen2_moe",
        "qkv_bias": True,
        "norm_topk": False,
        "shared_size": 32,
        "shared_gate": True,
        "dense_layers": (0,),
    },
    "deepseek": {
        "architecture": "dots1",
        "router_scores": "sigmoid",
        "qk_norm": True,
        "num_experts": 8,
        "expert_groups": 2,
        "groups_per_token": 1,
        "routed_scale": 1.5,
        "shared_size": 64,
        "dense_layers": (0,),
        "bias_rate": 0.01,
    },
}


def make(kind: str) -> MoEForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "head_dim": 8}
    config = MoEConfig(**tiny_moe_config(**sizes, **{"expert_size": 32, "initializer_range": 0.1, **KINDS[kind]}))
    model = build_model(config, seed=3)
    assert isinstance(model, MoEForCausalLM)
    return model.train()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        first = torch.randint(0, 64, (ROWS, 1), generator=generator)
        tokens = (first + 3 * torch.arange(LENGTH + 1)) % 64
        labels = tokens[:, 1:].clone()
        labels[::3, : LENGTH // 2] = -100  # rows with different numbers of trained tokens
        found.append({"input_ids": tokens[:, :-1], "labels": labels})
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Trained:
    """One model in training; with a mesh, this rank's part of it."""

    def __init__(self, kind: str, mesh: Mesh | None) -> None:
        self.mesh = mesh
        self.model: Any = make(kind)
        self.order = None
        self.data_parallel = None
        if mesh is not None:
            apply_tensor(self.model, mesh.tensor)
            apply_expert(self.model, mesh.expert, tensor=mesh.tensor, context=mesh.context)
            if mesh.context.size > 1:
                self.order = apply_context(self.model, mesh.context, ulysses=1)
            experts = [module for _, module in expert_modules(self.model)]
            self.data_parallel = apply_zero(self.model, mesh, experts=experts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, foreach=False)

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.mesh is None:
            return batch
        place, places = self.mesh.rows
        mine = {name: value.chunk(places)[place] for name, value in batch.items()}
        return mine if self.order is None else cut_batch(mine, self.mesh.context, self.order)

    def gradients(self, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Loss sum of all ranks, and loads; gradients are in the parameters."""
        rows = self.rows(batch)
        total = torch.zeros((), dtype=torch.float64)
        halves = 2 if len(rows["labels"]) > 1 else 1
        for number in range(halves):
            half = {name: value.chunk(halves)[number] for name, value in rows.items()}
            loss = CausalLM().loss(self.model, half).loss_sum
            last = number + 1 == halves
            if self.data_parallel is not None:
                self.data_parallel.begin_backward(last=last)
            loss.backward()
            if self.data_parallel is not None:
                self.data_parallel.end_backward(last=last)
            total += loss.detach()
        loads = self.model.take_loads()
        if self.mesh is not None:
            self.mesh.data.sum_(total)
            self.mesh.data.sum_(loads)
        return float(total), loads

    def step(self, batch: dict[str, Tensor]) -> float:
        total, loads = self.gradients(batch)
        count = int((batch["labels"] != -100).sum())
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_balance(loads)
        return total / count


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


def compare(kind: str, layout: dict[str, Any], world: int) -> dict[str, float]:
    """Largest relative differences to one process."""
    mesh = make_mesh(Layout(world=world, **layout), start())
    alone, divided = Trained(kind, None), Trained(kind, mesh)
    found: dict[str, float] = {"loss": 0.0, "gradient": 0.0, "steps": 0.0, "parameters": 0.0}
    first = batches()[0]
    expected, expected_loads = alone.gradients(first)
    total, loads = divided.gradients(first)
    found["loss"] = abs(total - expected) / expected
    found["loads"] = float((loads - expected_loads).abs().max())
    names = dict(alone.model.named_parameters())
    for name, parameter in divided.model.named_parameters():
        assert (parameter.grad is None) == (names[name].grad is None), name
        if parameter.grad is not None:
            found["gradient"] = max(found["gradient"], relative(whole(parameter.grad), names[name].grad))
    for one in (alone, divided):
        one.optimizer.zero_grad()
    learned = []
    for batch in batches():
        learned.append(alone.step(batch))
        found["steps"] = max(found["steps"], abs(divided.step(batch) / learned[-1] - 1))
    found["learned"] = learned[0] - learned[-1]
    for name, parameter in divided.model.named_parameters():
        found["parameters"] = max(found["parameters"], relative(whole(parameter.detach()), names[name].detach()))
    buffers = dict(alone.model.named_buffers())
    found["bias"] = max([float((buffers[n] - b).abs().max()) for n, b in divided.model.named_buffers()], default=0.0)
    return found  # groups live as long as the process: torch keeps the first of equal meshes in its caches


def on_rank(rank: int, world: int, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, float]]:
    return [compare(kind, layout, world) for kind, layout in cases]


def check(cases: list[tuple[str, dict[str, Any]]], world: int) -> None:
    for found in run_ranks(on_rank, world, cases, timeout=500):
        for case, differences in zip(cases, found, strict=True):
            assert differences["learned"] > 0.5, (case, "learns, so that wrong gradients would show")
            assert differences["loads"] == 0, case
            assert differences["bias"] == 0, case
            for what in ("loss", "gradient", "steps"):
                assert differences[what] < LIMIT, (case, what, differences)
            # Adam turns the sign of a gradient that is nothing but rounding into a whole step.
            assert differences["parameters"] < 1e-3, (case, differences)


PAIRS = [
    ("mixtral", {"zero": 0, "shard": 1, "expert": 2}),
    ("mixtral", {"zero": 3, "shard": 2, "expert": 2, "gather": "micro_batch"}),
    ("mixtral-capacity", {"zero": 1, "shard": 2, "expert": 2}),
    ("qwen2", {"zero": 0, "shard": 1, "expert": 2}),
    ("deepseek", {"zero": 2, "shard": 2, "expert": 2, "accumulate": "sharded"}),
    ("qwen2", {"zero": 0, "shard": 1, "tensor": 2}),
    ("deepseek", {"zero": 0, "shard": 1, "tensor": 2}),
    ("deepseek", {"zero": 0, "shard": 1, "context": 2}),
]


def test_two_ranks() -> None:
    check(PAIRS[:2], world=2)


@pytest.mark.slow
def test_two_ranks_of_every_kind() -> None:
    check(PAIRS[2:], world=2)


FOURS = [
    ("mixtral", {"zero": 0, "shard": 1, "expert": 4}),
    ("deepseek", {"zero": 0, "shard": 1, "expert": 2}),
    ("qwen2", {"zero": 3, "shard": 4, "expert": 2, "gather": "micro_batch"}),
    ("deepseek", {"zero": 1, "shard": 2, "expert": 2}),
    ("mixtral", {"zero": 2, "shard": 4, "expert": 4}),
    ("mixtral-few", {"zero": 3, "shard": 4, "expert": 2, "gather": "micro_batch"}),  # one expert on two ranks
    ("qwen2", {"zero": 0, "shard": 1, "expert": 2, "tensor": 2}),
    ("deepseek", {"zero": 3, "shard": 2, "expert": 2, "tensor": 2, "gather": "micro_batch"}),
    ("mixtral", {"zero": 3, "shard": 4, "expert": 2, "context": 2}),
    ("qwen2", {"zero": 1, "shard": 2, "tensor": 2}),
]


@pytest.mark.slow
def test_four_ranks() -> None:
    check(FOURS, world=4)


def _counted(rank: int, world: int) -> list[Any]:
    """Bytes of experts on this rank, and what sends of a step were made."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = make_mesh(Layout(world=world, zero=0, shard=1, expert=world), start())
    model = make("deepseek")
    before = sum(p.numel() for _, module in expert_modules(model) for p in module.parameters())
    rest = sum(p.numel() for p in model.parameters()) - before
    apply_expert(model, mesh.expert)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    after = sum(p.numel() for p in local) - rest
    storage = max(p.untyped_storage().nbytes() // p.element_size() for p in local if p.dim() == 3)
    batch = batches()[0]
    with CommDebugMode() as forward:
        loss = CausalLM().loss(model, batch).loss_sum
    with CommDebugMode() as backward:
        loss.backward()
    counts = [{str(op): count for op, count in mode.get_comm_counts().items()} for mode in (forward, backward)]
    return [before, after, storage, counts, len(model.moe_layers())]


def test_memory_and_messages() -> None:
    """Experts take 1/n of the memory, their storage included; each layer sends counts, copies there and copies back,
    and two messages in the backward pass."""
    for before, after, storage, (forward, backward), layers in run_ranks(_counted, 2):
        assert after * 2 == before
        assert storage == before // 3 // 2 // layers
        assert forward == {"c10d.alltoall_base_": 3 * layers}
        assert backward == {"c10d.alltoall_base_": 2 * layers}


def _travelled(rank: int, world: int) -> list[bool]:
    """Whether rows come back as they went, whatever the routing, and were where their experts are."""
    axis = make_mesh(Layout(world=world, zero=0, shard=1, expert=world), start()).expert
    held: list[bool] = []
    here = range(axis.rank * 3, axis.rank * 3 + 3)  # 3 experts on each rank
    for case in ("even", "uneven", "one expert", "nothing"):
        generator = torch.Generator().manual_seed(rank)
        chosen = {
            "even": torch.randint(0, 3 * world, (50,), generator=generator),
            "uneven": torch.randint(0, 3 + rank, (9 * rank,), generator=generator),
            "one expert": torch.full((7,), 1),
            "nothing": torch.zeros(0, dtype=torch.int64),
        }[case].sort()[0]
        # What each row says of itself: its expert and who sent it.
        rows = torch.stack((chosen.float(), torch.full((len(chosen),), float(rank))), 1).requires_grad_()

        def compute(arrived: Tensor, counts: Tensor) -> Tensor:
            expected = torch.repeat_interleave(torch.tensor(list(here)), counts)
            held.append(torch.equal(arrived[:, 0].long(), expected))
            return arrived * 2

        back = run_at_experts(compute, rows, torch.bincount(chosen, minlength=3 * world), axis)
        held.append(torch.equal(back, rows * 2))
        weight = torch.arange(back.numel(), dtype=torch.float32).view_as(back)
        (back * weight).sum().backward()
        held.append(torch.equal(rows.grad, 2 * weight))
    return held


def test_tokens_are_conserved_whatever_the_routing() -> None:
    for held in run_ranks(_travelled, 2):
        assert len(held) == 12
        assert all(held)
