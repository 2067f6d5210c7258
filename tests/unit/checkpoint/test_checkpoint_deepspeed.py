"""DeepSpeed checkpoints of every stage, made by hand with its keys, come back bit for bit; nothing in them is run."""

from __future__ import annotations

import enum
import json
import math
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.deepspeed import import_deepspeed
from trainwright.checkpoint.torch_file import Inert, read_torch_file
from trainwright.cli.checkpoint import app

GROUPS = [
    {"embed.weight": (37, 12), "a.weight": (7, 12), "b.weight": (12, 7)},
    {"a.bias": (7,), "b.bias": (12,), "norm": (1,)},
]
FROZEN = {"frozen.weight": (3, 5)}


class ZeroStageEnum(int, enum.Enum):
    disabled, optimizer_states, gradients, weights = range(4)


class LossScaler:
    """Stands for the objects of DeepSpeed's own classes inside its files."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def values(kind: str) -> dict[str, torch.Tensor]:
    """weights, exp_avg or exp_avg_sq of all trained parameters."""
    generator = torch.Generator().manual_seed(len(kind))
    return {n: torch.randn(s, generator=generator) for group in GROUPS for n, s in group.items()}


def flat_parts(kind: str, world: int) -> list[list[torch.Tensor]]:
    """Stages 1 and 2: by group, one vector cut into equal parts after padding to 2 * world."""
    groups = []
    for group in GROUPS:
        vector = torch.cat([values(kind)[name].view(-1) for name in group])
        padding = -vector.numel() % (2 * world)
        groups.append(list(torch.cat([vector, torch.zeros(padding)]).chunk(world)))
    return groups


def without_padding(groups: list[list[torch.Tensor]], rank: int, world: int) -> list[torch.Tensor]:
    result = []
    for group, parts in zip(GROUPS, groups, strict=True):
        used = sum(math.prod(shape) for shape in group.values())
        start = sum(part.numel() for part in parts[:rank])
        result.append(parts[rank][: max(0, used - start)].clone())
    return result


def shard3(kind: str, rank: int, world: int) -> list[torch.Tensor]:
    """Stage 3: each parameter in equal parts, padded; strung together, cut into two sub-groups at an odd place."""
    pieces = []
    for tensor in values(kind).values():
        size = -(-tensor.numel() // world)
        padded = torch.cat([tensor.view(-1), torch.zeros(size * world - tensor.numel())])
        pieces.append(padded[rank * size : (rank + 1) * size])
    whole = torch.cat(pieces)
    return [whole[:131].clone(), whole[131:].clone()]


def make(folder: Path, stage: int, world: int, *, prefix: str = "", bomb: Path | None = None) -> Path:
    place = folder / "global_step9"
    place.mkdir(parents=True)
    (folder / "latest").write_text("global_step9")
    weights = values("weights")
    module = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    frozen = {name: torch.ones(shape) * 0.5 for name, shape in FROZEN.items()}
    module |= {**frozen, "scale": torch.tensor([1.5, 2.5]), "head.weight": module["embed.weight"]}
    model: dict[str, Any] = {
        "module": OrderedDict(module),
        "buffer_names": ["scale"],
        "optimizer": None,
        "param_shapes": [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in GROUPS],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {"head.weight": "embed.weight"},
        "global_steps": 9,
        "global_samples": 72,
        "ds_version": "0.19.8",
        "lr_scheduler": LossScaler(),
    }
    if bomb is not None:
        model["client"] = Bomb(bomb)
    if stage >= 2:
        model["frozen_param_shapes"] = OrderedDict((n, torch.Size(s)) for n, s in FROZEN.items())
        model["frozen_param_fragments"] = frozen
    for rank in range(world):
        inner: dict[str, Any] = {
            "loss_scaler": LossScaler(),
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": world,
        }
        kinds = ("exp_avg", "exp_avg_sq")
        if stage < 3:
            parts = {kind: flat_parts(kind, world) for kind in ("weights", *kinds)}
            inner["single_partition_of_fp32_groups"] = without_padding(parts["weights"], rank, world)
            moments = {g: {"step": torch.tensor(9.0), **{k: parts[k][g][rank].clone() for k in kinds}} for g in (0, 1)}
            inner["base_optimizer_state"] = {"state": moments, "param_groups": [{"lr": 0.1}, {"lr": 0.1}]}
            inner["partition_count"] = [world, world]
        else:
            inner["fp32_flat_groups"] = [torch.nn.Parameter(v) for v in shard3("weights", rank, world)]
            inner["fp32_flat_groups"][0].marked = True  # DeepSpeed's have attributes, and are written in another way
            held = {kind: shard3(kind, rank, world) for kind in kinds}
            moments = {g: {"step": torch.tensor(9.0), **{k: held[k][g] for k in kinds}} for g in (0, 1)}
            inner["optimizer_state_dict"] = {"state": moments, "param_groups": [{"lr": 0.1}]}
            mine = {n: t.view(-1)[rank * -(-15 // world) :][: -(-15 // world)].clone() for n, t in frozen.items()}
            placeholders = {n: torch.empty(0, dtype=torch.bfloat16) for n in module if n != "scale"}
            own = {**model, "frozen_param_fragments": mine, "module": {**placeholders, "scale": module["scale"]}}
            torch.save(own, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": inner}, place / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if stage < 3:
        torch.save(model, place / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("stage", "prefix"), [(1, ""), (2, "bf16_"), (3, ""), (3, "bf16_")])
def test_every_stage(tmp_path: Path, stage: int, prefix: str, world: int) -> None:
    folder = make(tmp_path / "ds", stage, world, prefix=prefix)
    done = import_deepspeed(folder, tmp_path / "out", trust=True)
    assert (done.stage, done.ranks, done.moments, done.notes) == (stage, world, ("exp_avg", "exp_avg_sq"), ())
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {**values("weights"), "frozen.weight": torch.full((3, 5), 0.5), "scale": torch.tensor([1.5, 2.5])}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = load_file(tmp_path / "out" / "optimizer" / kind / "model.safetensors")
        assert moments.keys() == values(kind).keys()
        assert all(torch.equal(moments[name], tensor) for name, tensor in values(kind).items())
    report = json.loads((tmp_path / "out" / "deepspeed_import.json").read_text())
    assert report["tied"] == {"head.weight": "embed.weight"}
    assert (report["global_steps"], report["optimizer_step"], report["zero_stage"]) == (9, 9, stage)


def test_stage_0(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    model.append(torch.nn.Linear(4, 4, bias=False))
    model[3].weight = model[2].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    place = tmp_path / "ds" / "best"
    place.mkdir(parents=True)
    record = {
        "module": model.state_dict(),
        "buffer_names": [],
        "optimizer": optimizer.state_dict(),
        "param_shapes": None,
    }
    torch.save(record | {"shared_params": None, "global_steps": 1}, place / "mp_rank_00_model_states.pt")
    done = import_deepspeed(tmp_path / "ds", tmp_path / "out", tag="best", trust=True)
    assert (done.stage, done.ranks, done.moments) == (0, 1, ("exp_avg", "exp_avg_sq"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.named_parameters())
    assert "3.weight" not in found
    assert json.loads((tmp_path / "out" / "deepspeed_import.json").read_text())["tied"] == {"3.weight": "2.weight"}
    moments = load_file(tmp_path / "out" / "optimizer" / "exp_avg_sq" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(moments[name], optimizer.state[parameter]["exp_avg_sq"])


def test_nothing_in_the_files_is_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    folder = make(tmp_path / "ds", 2, 2, bomb=touched)
    import_deepspeed(folder, tmp_path / "out", trust=True)
    assert not touched.exists()
    torch.load(folder / "global_step9" / "mp_rank_00_model_states.pt", weights_only=False)
    assert touched.exists()  # it was a bomb


def test_it_takes_an_explicit_word(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", 1, 2)
    result = CliRunner().invoke(app, ["import-deepspeed", str(folder), str(tmp_path / "out")])
    assert isinstance(result.exception, CheckpointError)
    assert "pickle" in str(result.exception)
    assert "--allow-pickle" in str(result.exception)
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["import-deepspeed", str(folder), str(tmp_path / "out"), "--allow-pickle"])
    assert result.exit_code == 0, result.output
    assert "ZeRO stage 1, 2 ranks" in result.output
    assert "exp_avg, exp_avg_sq" in result.output
    with pytest.raises(CheckpointError, match="in use"):
        import_deepspeed(folder, tmp_path / "out", trust=True)


def test_what_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", 2, 3)
    place = folder / "global_step9"
    out = tmp_path / "out"
    lost = place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"3 ranks saved, but there are optimizer files of 2: \[0, 2\]"):
        import_deepspeed(folder, out, trust=True)
    lost.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=lost.name):
        import_deepspeed(folder, out, trust=True)
    lost.write_bytes(content)
    with pytest.raises(CheckpointError, match="no folder"):
        import_deepspeed(folder, out, tag="other", trust=True)
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="latest"):
        import_deepspeed(folder, out, trust=True)
    (folder / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="not a folder in it"):
        import_deepspeed(folder, out, trust=True)
    (place / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="tensor parallel"):
        import_deepspeed(folder, out, tag="global_step9", trust=True)
    (place / "mp_rank_01_model_states.pt").unlink()
    (place / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is missing"):
        import_deepspeed(folder, out, tag="global_step9", trust=True)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_vectors_that_do_not_fit_the_shapes_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", 3, 2)
    path = folder / "global_step9" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    record = {"optimizer_state_dict": {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.ones(50)]}}
    torch.save(record, path)
    with pytest.raises(CheckpointError, match="the parameters need"):
        import_deepspeed(folder, tmp_path / "out", trust=True)


# --- the file format --------------------------------------------------------------------------------------------------


def test_a_torch_file_is_read_as_data(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int64).view(4, 6)
    record = {
        "views": [base, base.t(), base[1:, ::2], base[0, 0]],
        "dtypes": {str(d): torch.ones(3, dtype=d) for d in (torch.float16, torch.bfloat16, torch.bool, torch.uint8)},
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": (1, -5, 10**30, 1.5, "语料", None, True, False, b"ab", (), [], {}, {3: {"x": [1, 2]}}),
        "object": LossScaler(),
        "stage": ZeroStageEnum(2),
    }
    torch.save(record, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    for one, other in zip(found["views"], record["views"], strict=True):
        assert torch.equal(one, other)
    for name, tensor in record["dtypes"].items():
        assert found["dtypes"][name].dtype == tensor.dtype
        assert torch.equal(found["dtypes"][name], tensor)
    assert found["empty"].shape == (0, 4)
    assert torch.equal(found["parameter"], torch.ones(2))
    assert found["plain"] == record["plain"]
    assert isinstance(found["object"], Inert)
    assert found["object"].name.endswith(".LossScaler")
    assert found["object"].state == {"cur_scale": 1.0}
    assert found["stage"].arguments == (2,)


def test_tensors_are_mapped_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    read_torch_file(tmp_path / "x.pt")["x"].zero_()
    assert (tmp_path / "x.pt").read_bytes() == before


def test_damaged_files_are_refused_not_crashed_on(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(50.0), "y": [1, {"z": "text"}]}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in entries if name.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(entries[program])
        at, bit = torch.randint(0, len(data) * 8, (1,), generator=generator).item().__divmod__(8)
        data[at] ^= 1 << bit
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, bytes(data) if name == program else content)
        try:
            read_torch_file(tmp_path / "bad.pt")
            outcomes.add("read")
        except CheckpointError as error:
            outcomes.add("named" if "bad.pt" in str(error) else "not named")
    assert outcomes == {"read", "named"}
    (tmp_path / "no.pt").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"torch 1\.6"):
        read_torch_file(tmp_path / "no.pt")
