"""Memory on sharded models: recomputing under FSDP2, state on disk for DTensors, bytes against the formulas."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.comm.mesh import Layout, make_mesh
from trainwright.comm.ranks import Ranks
from trainwright.memory import (
    ActivationMeter,
    ActivationOffload,
    HostCopies,
    MappedState,
    apply_recompute,
    count_memory,
)
from trainwright.models import Decoder, LlamaConfig, build_model
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.parallel import ZeroOptions, apply_zero
from trainwright.planner import ModelFacts
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.testing import run_ranks, tiny_llama_config

# Every first dimension is even, so that two ranks hold halves exactly, without padding.
CONFIG = tiny_llama_config(num_layers=3)


def model() -> Decoder:
    return build_model(LlamaConfig(**CONFIG), seed=3).train()


def loss_of(net: Decoder, rank: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * micro + rank)
    ids = torch.randint(0, 256, (2, 33), generator=generator)
    hidden = net.hidden_states(ids[:, :-1])
    return linear_cross_entropy(hidden.flatten(0, 1), net.head_weight, ids[:, 1:].flatten()).loss_sum


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def ranks_of(rank: int, world: int) -> Ranks:
    import torch.distributed as dist

    everyone = dist.group.WORLD
    return Ranks(rank, world, rank, world, torch.device("cpu"), group=everyone, host_group=everyone)


def gradients(ranks: Ranks, layout: Layout, policy: Any, offload: ActivationOffload | None = None) -> list[Tensor]:
    torch.manual_seed(7)
    net = model()
    apply_recompute(net, policy, offload=offload)
    parallel = apply_zero(net, make_mesh(layout, ranks), ZeroOptions())
    losses = []
    for micro in range(2):
        loss = loss_of(net, ranks.rank, micro)
        parallel.begin_backward(last=micro == 1)
        loss.backward()
        parallel.end_backward(last=micro == 1)
        losses.append(loss.detach())
    found = [local(p.grad).clone() for p in net.parameters() if p.grad is not None]
    parallel.close()
    return losses + found


def recompute_under_shards(rank: int, world: int) -> list[str]:
    ranks = ranks_of(rank, world)
    wrong = []
    for layout in (
        Layout(world, 1, world),
        Layout(world, 2, world, accumulate="sharded"),
        Layout(world, 3, world, gather="micro_batch"),
    ):
        expected = gradients(ranks, layout, "none")
        cases: list[tuple[Any, ActivationOffload | None]] = [
            ("full", None),
            ({"every": 2}, None),
            ("selective", None),
            ("full", ActivationOffload(HostCopies())),
            ("none", ActivationOffload(HostCopies())),
        ]
        for policy, offload in cases:
            found = gradients(ranks, layout, policy, offload)
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(f"zero {layout.zero}, {policy}, offload {offload is not None}")
    return wrong


def test_recomputing_inside_sharded_blocks_is_bitwise_equal() -> None:
    assert run_ranks(recompute_under_shards, 2) == [[], []]


class Uneven(nn.Module):
    """Rows that two ranks cannot halve; a vector of which the second rank holds nothing; a large one that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1501, 96)
        self.up = nn.Linear(96, 333)
        self.single = nn.Parameter(torch.ones(1, 2048))
        self.down = nn.Linear(333, 96, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.words(ids)))).square().sum() + (self.single * 1e-3).square().sum()


def state_on_disk(rank: int, world: int, folder: str) -> list[str]:
    ranks = ranks_of(rank, world)
    wrong = []
    for name in ("adamw", "muon", "adafactor"):
        results = []
        for placed in (False, True):
            torch.manual_seed(5)
            net = Uneven()
            parallel = apply_zero(net, make_mesh(Layout(world, 2, world), ranks), ZeroOptions())
            optimizer = build_optimizer(net.named_parameters(), OptimizerOptions(name=name, lr=0.01))
            store = MappedState(optimizer, folder, bucket_bytes=64 << 10) if placed else None
            for step in range(3):
                ids = torch.randint(0, 1501, (64,), generator=torch.Generator().manual_seed(10 * step + rank))
                parallel.begin_backward(last=True)
                net(ids).backward()
                parallel.end_backward(last=True)
                optimizer.step(gradient_factor=torch.tensor(0.1))
                optimizer.zero_grad()
                parallel.drop_gathered()
            state = optimizer.state_dict()["parameters"]
            found = {n: local(p.detach()).clone() for n, p in net.named_parameters()}
            found |= {f"{n}.{k}": local(v).clone() for n, values in state.items() for k, v in values.items()}
            results.append(found)
            if store is not None and store.moved_bytes < 1501 * 96 * 4 // world and name != "adafactor":
                wrong.append(f"{name}: only {store.moved_bytes} bytes were moved")
            if store is not None:
                store.close(keep=False)
            parallel.close()
        plain, other = results
        wrong += [f"{name}: {key}" for key in plain if key not in other or not torch.equal(plain[key], other[key])]
    return wrong


def test_state_on_disk_of_sharded_parameters_is_bitwise_equal() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(state_on_disk, 2, folder) == [[], []]


def counted(rank: int, world: int) -> list[str]:
    ranks = ranks_of(rank, world)
    facts = ModelFacts(sum(p.numel() for p in model().parameters()), 1.0, 3, 64, 256)
    block = sum(p.numel() for p in model().blocks[0].parameters())
    settings = MemorySettings(2, 32, precision="fp32", shard=world, block_parameters=block)
    wrong = []

    def check(what: str, found: int, expected: int) -> None:
        if found != expected:
            wrong.append(f"{what}: counted {found}, predicted {expected}")

    for zero, accumulate, gather in (
        (1, "local", "step"),
        (2, "sharded", "step"),
        (2, "local", "step"),
        (3, "sharded", "micro_batch"),
    ):
        net = model()
        layout = Layout(world, zero, world, accumulate=accumulate, gather=gather)
        parallel = apply_zero(net, make_mesh(layout, ranks), ZeroOptions())
        optimizer = build_optimizer(net.named_parameters(), OptimizerOptions(name="sgd", momentum=0.9, lr=0.1))
        predicted = predict_rank_memory(
            facts,
            replace(settings, zero=zero, accumulate=accumulate, gather=gather, micro_batches=2, optimizer="sgd"),
        )
        what = f"zero {zero}, {accumulate}"
        for micro in range(2):
            with ActivationMeter(net) as meter:
                loss = loss_of(net, rank, micro)
            report = count_memory(net, optimizer, activations=meter.activations)
            if zero < 3:
                check(f"{what}, gathered", report.gathered, predicted.gathered)
            elif report.gathered > predicted.gathered:
                wrong.append(f"{what}: {report.gathered} gathered, predicted at most {predicted.gathered}")
            check(f"{what}, parameters", report.parameters, predicted.parameters)
            parallel.begin_backward(last=micro == 1)
            loss.backward()
            if micro == 0 and accumulate == "local":
                check(f"{what}, whole gradients", count_memory(net).gradients, predicted.gradients)
            parallel.end_backward(last=micro == 1)
        part = facts.parameters * 4 // world
        check(f"{what}, gradients after the step's last pass", count_memory(net).gradients, part)
        optimizer.step()
        check(f"{what}, optimizer", count_memory(net, optimizer).optimizer, predicted.optimizer)
        parallel.close()
    return wrong


def test_counted_bytes_are_those_of_the_formulas() -> None:
    assert run_ranks(counted, 2) == [[], []]


def test_the_same_on_four_ranks() -> None:
    assert run_ranks(counted, 4) == [[], [], [], []]
