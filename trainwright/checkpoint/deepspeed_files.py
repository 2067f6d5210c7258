"""What a DeepSpeed checkpoint holds, as tensors that can be read one by one: weights in fp32, and moments by name.

Stages 1 and 2 (and the bf16 optimizer of stage 0) keep, per parameter group, one flat vector that is cut into one part
per rank. Stage 3 cuts every parameter by itself into equal parts, padded, and strings the parts of a rank together.
Which part of a vector is which parameter follows from the order of `param_shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.torch_file import Inert, read_torch_file

__all__ = ["DeepSpeedState", "LazyTensor", "read_deepspeed"]

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose bytes are collected when `read` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass
class DeepSpeedState:
    """A DeepSpeed checkpoint.

    Attributes:
        stage, ranks: ZeRO stage and the number of ranks that saved.
        facts: step counts and versions, as JSON.
        weights: name -> fp32 weights; buffers as they were.
        moments: `exp_avg` and the like -> name -> tensor.
        tied: name -> the name under which its weights are stored.
        notes: what could not be brought over, and why.
    """

    stage: int
    ranks: int
    facts: dict[str, Any]
    weights: dict[str, LazyTensor] = field(default_factory=dict)
    moments: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_deepspeed(folder: Path, tag: str | None = None) -> DeepSpeedState:
    """Look through `folder/tag`; tensors are read later.

    Args:
        tag: None takes the one that the file `latest` names.

    Raises:
        CheckpointError: files are missing or damaged, or of a kind that cannot be brought over (tensor or pipeline
            parallel, mixture of experts).
    """
    place = folder / (tag if tag is not None else _latest(folder))
    if not place.is_dir():
        raise CheckpointError(f"there is no folder {place}", hint="name the tag with --tag (the folder inside)")
    names = sorted(path.name for path in place.iterdir())
    found = {int(m[1]): name for name in names if (m := _OPTIMIZER_FILE.fullmatch(name)) and int(m[2]) == 0}
    _refuse_other_parallelism(place, names)
    inner = [_optimizer(place / found[rank]) for rank in sorted(found)]
    stage = _number(inner[0].get("zero_stage", 1)) if inner else 0
    models = _models(place, names, stage)
    first = models[0]
    count = inner[0].get("partition_count", len(inner)) if inner else 0
    count = max(count) if isinstance(count, (list, tuple)) else count
    if inner and (count != len(found) or sorted(found) != list(range(len(found)))):
        raise CheckpointError(
            f"{place}: {count} ranks saved, but there are optimizer files of {len(found)}: {sorted(found)}",
            hint="copy the files of all ranks into one folder",
        )
    facts = {key: first.get(key) for key in ("ds_version", "global_steps", "global_samples", "skipped_steps")}
    state = DeepSpeedState(stage, max(1, len(inner)), {k: v for k, v in facts.items() if isinstance(v, (int, str))})
    module = {k: v for k, v in _dict(first.get("module"), place).items() if isinstance(v, torch.Tensor)}
    buffers = {n for n in first.get("buffer_names") or [] if isinstance(n, str)}
    shared = first.get("shared_params") or {}
    state.tied = {str(alias): str(name) for alias, name in (shared.items() if isinstance(shared, dict) else shared)}
    if inner:
        _partitioned(state, inner, first, place)
    _frozen(state, models, stage)
    for name, tensor in module.items():
        if name in state.weights or name in state.tied or (stage == 3 and name not in buffers):
            continue  # stage 3 leaves empty placeholders in the module
        state.weights[name] = _own(tensor, name not in buffers)
    if not inner:
        _unpartitioned(state, first, module, buffers)
    if not state.weights:
        raise CheckpointError(f"{place} holds no weights")
    order = {name: position for position, name in enumerate([*module, *state.weights])}
    state.weights = dict(sorted(state.weights.items(), key=lambda item: order[item[0]]))
    return state


def _latest(folder: Path) -> str:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no file `latest`, so it does not say which checkpoint to take",
            hint="name the tag with --tag (the folder inside, such as global_step100)",
        ) from error
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"{folder}/latest names {tag!r}, which is not a folder in it")
    return tag


def _refuse_other_parallelism(place: Path, names: Sequence[str]) -> None:
    others = [name for name in names if re.search(r"mp_rank_(?!00)\d+", name)]
    kinds = {
        "tensor parallel": others,
        "mixture of experts": [name for name in names if "expert_" in name],
        "pipeline parallel": [name for name in names if re.match(r"layer_\d+", name) and "expert" not in name],
    }
    for kind, files in kinds.items():
        if files:
            raise CheckpointError(
                f"{place} is a {kind} checkpoint ({files[0]}), which cannot be brought over",
                hint="consolidate it with the tools of the framework that wrote it",
            )


def _models(place: Path, names: Sequence[str], stage: int) -> list[dict[str, Any]]:
    """The model files: one, or at stage 3 one per rank, by rank."""
    if stage < 3:
        wanted = ["mp_rank_00_model_states.pt"]
    else:
        pattern = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
        wanted = sorted((n for n in names if pattern.fullmatch(n)), key=lambda n: int(n.split("_")[3]))
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        raise CheckpointError(
            f"{place}: {(missing or ['zero_pp_rank_0_mp_rank_00_model_states.pt'])[0]} is missing",
            hint="a DeepSpeed checkpoint was expected: mp_rank_00_model_states.pt and *_optim_states.pt",
        )
    return [_dict(read_torch_file(place / name), place / name) for name in wanted]


def _optimizer(path: Path) -> dict[str, Any]:
    return _dict(_dict(read_torch_file(path), path).get("optimizer_state_dict"), path)


def _dict(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has another structure than DeepSpeed writes: {type(value).__name__} for a dict")
    return value


def _number(value: Any) -> int:
    value = value.arguments[0] if isinstance(value, Inert) and value.arguments else value  # an enum
    if type(value) is not int or not 0 <= value <= 3:
        raise CheckpointError(f"ZeRO stage {value!r}, expected 0 to 3")
    return value


def _own(tensor: torch.Tensor, widen: bool) -> LazyTensor:
    wide = widen and tensor.is_floating_point()
    return LazyTensor(
        tuple(tensor.shape),
        torch.float32 if wide else tensor.dtype,
        lambda: tensor.float() if wide else tensor,
    )


# --- flat vectors -----------------------------------------------------------------------------------------------------


def _join(parts: Sequence[torch.Tensor], first: int, count: int) -> torch.Tensor:
    """`count` elements from `first` on of the vectors laid end to end."""
    pieces = []
    for part in parts:
        start, stop = max(0, first), min(part.numel(), first + count)
        if start < stop:
            pieces.append(part.view(-1)[start:stop])
        first -= part.numel()
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=parts[0].dtype)


def _partitioned(
    state: DeepSpeedState, inner: Sequence[Mapping[str, Any]], model: Mapping[str, Any], place: Path
) -> None:
    """Weights and moments of the optimizer files, for stages 1 to 3."""
    key = "fp32_flat_groups" if state.stage == 3 else "single_partition_of_fp32_groups"
    shapes = [dict(group) for group in model.get("param_shapes") or []]
    if any(any(_paddings(o.get("param_alignment_paddings"))) for o in inner):
        raise CheckpointError(
            f"{place}: its parameters are padded (zero_optimization.parameter_alignment), which cannot be brought over"
        )
    flat = [_vectors(one.get(key), f"{place}: {key}") for one in inner]
    state.weights.update(_cut(state.stage, shapes, flat, f"{place}: {key}"))
    steps: set[Any] = set()
    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum"):
        held = [_moment(one, state.stage, name, len(flat[0]), steps) for one in inner]
        if any(vectors is None for vectors in held):
            continue
        try:
            state.moments[name] = _cut(state.stage, shapes, [v for v in held if v is not None], name)
        except CheckpointError as error:
            state.notes.append(f"{name} is left out: {error.message}")
    if len(steps) == 1:
        state.facts["optimizer_step"] = steps.pop()
    if not state.moments:
        state.notes.append("no moments of an optimizer were found in a known place")


def _paddings(value: Any) -> Iterator[bool]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _paddings(item)
    elif isinstance(value, dict):
        yield from _paddings(list(value.values()))
    else:
        yield isinstance(value, int) and value > 0


def _vectors(value: Any, where: str) -> list[torch.Tensor]:
    vectors = [value] if isinstance(value, torch.Tensor) else value
    if not isinstance(vectors, (list, tuple)) or not all(isinstance(v, torch.Tensor) for v in vectors):
        raise CheckpointError(f"{where}: expected a list of flat tensors")
    return [vector.reshape(-1) for vector in vectors]


def _moment(inner: Mapping[str, Any], stage: int, name: str, groups: int, steps: set[Any]) -> list[torch.Tensor] | None:
    """One vector per group of a moment, or None where this optimizer has none of that name."""
    base = inner.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    table = base.get("state") if isinstance(base, dict) else dict(enumerate(base or []))
    if not isinstance(table, dict) or len(table) < groups:
        return None
    entries = [table.get(group) for group in range(groups)]
    if not all(isinstance(entry, dict) and isinstance(entry.get(name), torch.Tensor) for entry in entries):
        return None
    for entry in entries:
        step = entry.get("step") if isinstance(entry, dict) else None
        step = int(step.item()) if isinstance(step, torch.Tensor) and step.numel() == 1 else step
        if isinstance(step, (int, float)):
            steps.add(int(step))
    if not steps and isinstance(base, dict) and base.get("param_groups"):
        step = base["param_groups"][0].get("step")
        steps |= {step} if isinstance(step, int) else set()
    return [entry[name].reshape(-1) for entry in entries if isinstance(entry, dict)]


def _cut(
    stage: int, shapes: Sequence[Mapping[str, Any]], flat: Sequence[Sequence[torch.Tensor]], where: str
) -> dict[str, LazyTensor]:
    """The parameters inside the flat vectors of all ranks; checks that they use the vectors up."""
    result: dict[str, LazyTensor] = {}
    ranks = len(flat)
    if stage == 3:
        offset = 0
        for name, shape in ((n, tuple(s)) for group in shapes for n, s in group.items()):
            count = -(-math.prod(shape) // ranks)
            result[name] = _lazy(shape, flat[0][0].dtype, [(rank, offset, count) for rank in flat])
            offset += count
        _check_used(offset, [sum(vector.numel() for vector in rank) for rank in flat], 1, where)
        return result
    if any(len(rank) != len(shapes) for rank in flat):
        raise CheckpointError(f"{where}: {len(shapes)} parameter groups, but vectors of {[len(r) for r in flat]}")
    for group, members in enumerate(shapes):
        vectors = [rank[group] for rank in flat]
        offset = 0
        for name, shape in ((n, tuple(s)) for n, s in members.items()):
            result[name] = _lazy(shape, vectors[0].dtype, [(vectors, offset, math.prod(shape))])
            offset += math.prod(shape)
        # The end is padded so that 2 * ranks divides it.
        _check_used(offset, [sum(vector.numel() for vector in vectors)], 2 * ranks, where)
    return result


def _check_used(used: int, available: Sequence[int], unit: int, where: str) -> None:
    for size in available:
        if used > size or -(-used // unit) != -(-size // unit):
            raise CheckpointError(f"{where}: the parameters need {used} elements, the vectors have {size}")


def _lazy(
    shape: tuple[int, ...], dtype: torch.dtype, spans: Sequence[tuple[Sequence[torch.Tensor], int, int]]
) -> LazyTensor:
    def read() -> torch.Tensor:
        joined = torch.cat([_join(parts, first, count) for parts, first, count in spans])
        return joined[: math.prod(shape)].view(shape).float()

    return LazyTensor(shape, torch.float32 if dtype.is_floating_point else dtype, read)


def _frozen(state: DeepSpeedState, models: Sequence[Mapping[str, Any]], stage: int) -> None:
    """Parameters that are not trained: whole at stage 2, in parts of all ranks at stage 3."""
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        parts = [model["frozen_param_fragments"][name] for model in (models if stage == 3 else models[:1])]
        state.weights[name] = _lazy(tuple(shape), parts[0].dtype, [([p], 0, p.numel()) for p in parts])


def _unpartitioned(
    state: DeepSpeedState, model: Mapping[str, Any], module: Mapping[str, torch.Tensor], buffers: set[str]
) -> None:
    """Stage 0: the weights are the module's; moments where the optimizer numbers its parameters in that order."""
    seen: dict[tuple[Any, ...], str] = {}
    for name in module:  # tied weights stand in the module under each of their names
        tensor = module[name]
        first = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())), name)
        if first != name and tensor.numel():
            state.tied[name] = first
            state.weights.pop(name, None)
    parameters = [name for name in module if name not in buffers and name not in state.tied]
    half = [name for name in parameters if module[name].dtype in (torch.float16, torch.bfloat16)]
    optimizer = model.get("optimizer")
    if half:
        state.notes.append(
            f"{len(half)} weights are those of the 16-bit module: the fp32 copies in the optimizer carry no names"
        )
    table = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(table, dict) or not table:
        state.notes.append("no moments of an optimizer were found in a known place")
        return
    entries = [table.get(index) for index in range(len(parameters))]
    fits = len(table) == len(parameters) and all(
        isinstance(entry, dict)
        and all(v.shape == module[n].shape for v in entry.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
        for n, entry in zip(parameters, entries, strict=True)
    )
    if not fits:
        state.notes.append("the moments are left out: the optimizer's parameters are not those of the module in order")
        return
    for name, entry in zip(parameters, entries, strict=True):
        for key, value in entry.items() if entry else ():
            if isinstance(value, torch.Tensor) and value.shape == module[name].shape and key != "step":
                state.moments.setdefault(str(key), {})[name] = _own(value, True)
