"""A checkpoint from any layout loads into any other, bit by bit: parameters, optimizer state, averages and values.

Every layout of the table saves once; every checkpoint is loaded into every layout, and read as whole rows for export.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint, verify
from trainwright.comm import ALONE, Ranks
from trainwright.comm.boxes import cut, local_boxes
from trainwright.engine import readable_weights
from trainwright.optim import EMA, OptimizerOptions, build_optimizer
from trainwright.testing import run_ranks

BLOCKS = 4
BLOCK = {"up.weight": (7, 12), "down.weight": (12, 7), "experts": (4, 6, 8), "scale": (1,), "one_row.weight": (1, 9)}
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    **{f"blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in BLOCK.items()},
    "norm.weight": (10,),
}
HEAD, EMBED = "head.weight", "embed.weight"  # tied: one parameter of two names
TWO_STAGES = ({EMBED, "0", "1"}, {HEAD, "norm.weight", "2", "3"})
FOUR_PARTS = ({EMBED, "0", "2"}, {HEAD, "norm.weight", "1", "3"})
ROWS = (_StridedShard(0, split_factor=2), Shard(0))

Place = tuple[DeviceMesh, tuple[Any, ...]] | None
"""Mesh and placements of a parameter; None where it is plain."""


class Layout:
    """Which parameters this rank has, and how they are divided."""

    def __init__(self, place: Callable[[str], Place], has: set[str] | None = None, ranks: Ranks = ALONE) -> None:
        self.place = place
        self.has = has
        self.ranks = ranks

    def holds(self, name: str) -> bool:
        if self.has is None:
            return True
        key = name.split(".")[1] if name.startswith("blocks") else name
        return key in self.has or (name == EMBED and HEAD in self.has)


def layouts(ranks: Ranks) -> dict[str, Layout]:
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("four",))
    stage = ranks.rank // 2

    def shard_and_tensor(name: str) -> Place:
        table: dict[str, tuple[Any, ...]] = {
            "down.weight": (Shard(0), Shard(1)),
            "experts": (Shard(0), Shard(1)),
            "norm.weight": (Shard(0), Replicate()),
            "scale": (Shard(0), Replicate()),
        }
        return pair, next((found for end, found in table.items() if name.endswith(end)), ROWS)

    def tensor(mesh: DeviceMesh) -> Callable[[str], Place]:
        def place(name: str) -> Place:
            if name.endswith(("norm.weight", "scale")):
                return mesh, (Replicate(),)
            return mesh, (Shard(1) if name.endswith(("down.weight", "experts")) else Shard(0),)

        return place

    def expert(name: str) -> Place:
        return (pair, ROWS) if name.endswith("experts") else (four, (Shard(0),))

    def expert_columns(name: str) -> Place:
        return (pair, (Shard(1), Shard(0))) if name.endswith("experts") else (four, (Shard(0),))

    def hybrid(name: str) -> Place:
        return pair["tensor"], (Shard(0),)

    def plain(name: str) -> Place:
        return None

    return {
        "shard 2 tensor 2": Layout(shard_and_tensor, None, ranks),
        "tensor 4": Layout(tensor(four), None, ranks),
        "shard 4": Layout(lambda name: (four, (Shard(0),)), None, ranks),
        "2 replicas of shard 2": Layout(hybrid, None, ranks),
        "pipeline 2 tensor 2": Layout(tensor(pair["tensor"]), TWO_STAGES[stage], ranks),
        "interleaved 2 shard 2": Layout(hybrid, FOUR_PARTS[stage], ranks),
        "pipeline 2 replicated": Layout(plain, TWO_STAGES[stage], ranks),
        "expert 2 expert shard 2": Layout(expert, None, ranks),
        "expert 2, its rows sharded": Layout(expert_columns, None, ranks),
        "replicated": Layout(plain, None, ranks),
        "one process": Layout(plain, None, ALONE),
    }


def whole(name: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator) * scale


def divided(value: Tensor, place: Place) -> Tensor:
    if place is None:
        return value
    mesh, placements = place
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = cut(value, *local_boxes(value.shape, mesh.shape, coordinate, placements)).clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


class State:
    """Parameters, optimizer and averages of one layout, as a trainer would have them."""

    def __init__(self, layout: Layout, algorithm: str, *, filled: bool) -> None:
        self.layout = layout
        self.parameters = {
            name: nn.Parameter(divided(whole(name) if filled else torch.zeros(shape), layout.place(name)))
            for name, shape in SHAPES.items()
            if layout.holds(name)
        }
        self.optimizer = build_optimizer(self.parameters.items(), OptimizerOptions(name=algorithm, lr=0.125))
        self.ema = EMA(self.parameters.items())
        if filled:
            self.fill()

    def fill(self) -> None:
        """Every number of the state is a function of its place in the whole."""
        self.optimizer.materialise_state()
        wholes = build_optimizer([(name, nn.Parameter(whole(name))) for name in SHAPES], self.optimizer_options())
        state = wholes.state_dict()
        for name, entries in state["parameters"].items():
            for i, tensor in enumerate(entries.values()):
                values = torch.arange(tensor.numel()).view(tensor.shape) + 1000 * i + len(name)
                tensor.copy_(values)
        state["steps"] = 17
        mine = {name: state["parameters"][name] for name in self.parameters}
        settings = {name: {**state["settings"][name], "lr": 0.0625} for name in self.parameters}
        self.optimizer.load_state_dict({**state, "parameters": mine, "settings": settings})
        self.ema.load_state_dict({"steps": 5, "averages": {name: whole(name, 3.0) for name in self.parameters}})

    def optimizer_options(self) -> OptimizerOptions:
        return OptimizerOptions(name=self.optimizer.param_groups[0]["algorithm"], lr=0.125)

    def state_dict(self) -> dict[str, Any]:
        model: dict[str, Any] = dict(self.parameters)
        if self.layout.has is None or HEAD in self.layout.has:
            model[HEAD] = model[EMBED]  # the last stage shows its copy under both names
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "train": {"step": 17, "seen": {"0": [1, 2], "1": float("nan")}, "best": None},
        }

    def load(self, state: dict[str, Any]) -> None:
        assert set(state["model"]) == set(self.state_dict()["model"])
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        assert state["train"]["step"] == 17
        assert state["train"]["seen"]["0"] == [1, 2]

    def assert_same(self, other: State, what: str) -> None:
        pairs: list[tuple[str, Tensor, Tensor]]
        pairs = [(f"parameter {name}", p, other.parameters[name]) for name, p in self.parameters.items()]
        mine, theirs = self.optimizer.state_dict(), other.optimizer.state_dict()
        for name, entries in mine["parameters"].items():
            assert set(entries) == set(theirs["parameters"][name])
            pairs += [(f"{name} {key}", tensor, theirs["parameters"][name][key]) for key, tensor in entries.items()]
        pairs += [(f"average of {name}", a, other.ema.averages[name]) for name, a in self.ema.averages.items()]
        for name, a, b in pairs:
            parts = [t.to_local() if isinstance(t, DTensor) else t for t in (a, b)]
            assert torch.equal(*parts), f"{what}: {name}"
        assert mine["settings"] == theirs["settings"], what
        assert mine["steps"] == theirs["steps"] == 17
        assert self.ema.steps == other.ema.steps == 5


def every_pair(rank: int, world: int, folder: str, algorithm: str) -> int:
    from trainwright.comm import start

    ranks = start(device="cpu")
    table = layouts(ranks)
    root = Path(folder)
    for number, layout in enumerate(table.values()):
        if layout.ranks.world > 1 or rank == 0:
            saved = save_checkpoint(
                root, number, State(layout, algorithm, filled=True).state_dict(), ranks=layout.ranks
            )
            assert saved.step == number
        ranks.barrier()
    loads = 0
    filled = {name: State(layout, algorithm, filled=True) for name, layout in table.items()}
    for (number, source), (name, layout) in itertools.product(enumerate(table), table.items()):
        if layout.ranks.world == 1 and rank:
            continue
        target = State(layout, algorithm, filled=False)
        state, _ = load_checkpoint(root / f"step-{number}", like=target.state_dict(), ranks=layout.ranks)
        target.load(state)
        target.assert_same(filled[name], f"{source} -> {name}")
        loads += 1
    ranks.barrier()
    return loads


@pytest.mark.parametrize("algorithm", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_every_layout_into_every_other(tmp_path: Path, algorithm: str) -> None:
    loads = run_ranks(every_pair, 4, str(tmp_path), algorithm, timeout=300)
    assert loads == [121, 110, 110, 110]
    contents = []
    for step in range(11):
        path = tmp_path / f"step-{step}"
        assert verify(path).ok
        with CheckpointReader(path) as reader:
            state = reader.read_state()
            assert state["model"][HEAD] is state["model"][EMBED], "the tied parameter is stored once"
            contents.append({name: (entry.shape, entry.dtype) for name, entry in reader.manifest.tensors.items()})
            assert state["optimizer"]["settings"]["norm.weight"] == {"algorithm": algorithm, "lr": 0.0625}
            for name in SHAPES:
                assert torch.equal(state["model"][name], whole(name))
    assert all(content == contents[0] for content in contents)


# --- the whole, row by row --------------------------------------------------------------------------------------------


def engine_of(parameters: Mapping[str, Tensor], ranks: Ranks) -> Any:
    """As much of an engine as reading its weights takes."""
    model = nn.Module()
    for name, tensor in parameters.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    return SimpleNamespace(model=model, ranks=ranks, data_parallel=SimpleNamespace(drop_gathered=lambda: None))


def read_rows(rank: int, world: int) -> int:
    from trainwright.comm import start

    ranks = start(device="cpu")
    read = 0
    for name, layout in layouts(ranks).items():
        if layout.ranks.world == 1 and rank:
            continue
        state = State(layout, "adamw", filled=True)
        engine = engine_of(state.parameters, layout.ranks)
        with readable_weights(engine) as source:
            assert (source is None) == (rank > 0)
            if source is not None:
                whole_model = engine_of({key: whole(key) for key in SHAPES}, ALONE).model
                assert list(source.shapes) == [key for key, _ in whole_model.named_parameters()], name
                assert dict(source.shapes) == SHAPES
                for key, shape in SHAPES.items():
                    for first, count in ((0, shape[0]), (shape[0] // 3, shape[0] - shape[0] // 3), (shape[0] - 1, 1)):
                        rows = source.read(key, first, count)
                        assert torch.equal(rows, whole(key)[first : first + count]), f"{name} {key} {first}"
                        read += 1
    engine = engine_of({"w": torch.ones(2 + (rank == 3), 2)}, ranks)
    with pytest.raises(CheckpointError, match=r"w is float32 \[2, 2\] on rank 0, float32 \[3, 2\] on rank 3"):
        readable_weights(engine).__enter__()
    return read


def test_whole_rows_of_every_layout() -> None:
    assert run_ranks(read_rows, 4, timeout=240)[0] == 11 * 3 * len(SHAPES)


# --- what does not fit ------------------------------------------------------------------------------------------------


def what_does_not_fit(rank: int, world: int, folder: str) -> list[str]:
    from trainwright.comm import start

    ranks = start(device="cpu")
    halves = TWO_STAGES[rank]
    layout = Layout(lambda name: None, halves, ranks)
    told = []

    def failing(work: Callable[[], Any]) -> None:
        try:
            work()
            told.append("nothing")
        except CheckpointError as error:
            told.append(str(error))

    state = State(layout, "adamw", filled=True).state_dict()
    save_checkpoint(folder, 1, state, ranks=ranks)
    # A place that no rank asks for, and one that the checkpoint does not have.
    like = State(layout, "adamw", filled=False).state_dict()
    if rank == 1:
        del like["model"]["norm.weight"]
        like["model"]["more"] = torch.ones(3)
    failing(lambda: load_checkpoint(Path(folder) / "step-1", like=like, ranks=ranks))
    # Values that both stages have, and that are not the same.
    failing(lambda: save_checkpoint(folder, 2, {**state, "train": {"step": 17 + rank}}, ranks=ranks))
    # A tensor of which nobody holds the other half.
    mesh = init_device_mesh("cpu", (2,))
    half = DTensor.from_local(
        torch.ones(2, 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 2)), stride=(2, 1)
    )
    failing(lambda: save_checkpoint(folder, 2, {"model": {"w": half} if rank == 0 else {"v": half}}, ranks=ranks))
    return told


def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path: Path) -> None:
    told = run_ranks(what_does_not_fit, 2, str(tmp_path))
    assert told[0] == told[1]
    names, values, incomplete = told[0]
    assert "model/norm.weight: the checkpoint has float32 [10], wanted nothing of this name" in names
    assert "model/more: the checkpoint has nothing of this name, wanted float32 [3]" in names
    assert "model/blocks.0" not in names
    assert "train/step is 17 on rank 0, 18 on rank 1" in values
    assert "the parts of 1 of 2 ranks do not make up the whole" in incomplete


# --- what FSDP2 over tensor parallelism really makes ------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(5, width)
        self.down = nn.Linear(width, 6)


def real_parts(rank: int, world: int, folder: str, shard: int) -> list[int]:
    from trainwright.comm import start

    ranks = start(device="cpu")
    mesh = init_device_mesh("cpu", (shard, world // shard), mesh_dim_names=("shard", "tensor"))
    saved = []
    for width in range(1, 18):
        torch.manual_seed(width)
        net: Any = Pair(width)
        values = {name: p.detach().clone() for name, p in net.named_parameters()}
        parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net, mesh=mesh["shard"])
        save_checkpoint(folder, width, {"model": dict(net.named_parameters())}, ranks=ranks)
        whole_state, _ = load_checkpoint(Path(folder) / f"step-{width}", ranks=ranks)
        for name, value in values.items():
            assert torch.equal(whole_state["model"][name], value), f"width {width}: {name}"
        for parameter in net.parameters():
            with torch.no_grad():
                parameter.to_local().zero_()
        state, _ = load_checkpoint(
            Path(folder) / f"step-{width}", like={"model": dict(net.named_parameters())}, ranks=ranks
        )
        net.load_state_dict(state["model"])
        again, _ = load_checkpoint(
            Path(folder) / f"step-{width}", like={"model": dict(net.named_parameters())}, ranks=ranks
        )
        for name, p in net.named_parameters():
            assert torch.equal(p.to_local(), again["model"][name].to_local())
        saved.append(width)
    dist.barrier()
    return saved


@pytest.mark.parametrize(("world", "shard"), [(4, 2), pytest.param(6, 3, marks=pytest.mark.slow)])
def test_odd_sizes_under_fsdp_and_tensor_parallelism(tmp_path: Path, world: int, shard: int) -> None:
    assert run_ranks(real_parts, world, str(tmp_path), shard, timeout=300) == [list(range(1, 18))] * world
