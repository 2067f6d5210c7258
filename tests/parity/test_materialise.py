"""A model divided on the meta device and given its weights there is the model that was built whole and divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.base.errors import ModelError
from trainwright.comm import ALONE, start
from trainwright.comm.layout import PipelineLayout
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.comm.ranks import Ranks
from trainwright.engine.materialise import materialise
from trainwright.models import (
    Decoder,
    Pretrained,
    build_model,
    initial_values,
    kept_tensors,
    load_pretrained,
    preset,
    save_pretrained,
)
from trainwright.parallel import apply_zero
from trainwright.parallel.pipeline import split_model
from trainwright.parallel.tensor import apply_tensor
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks

TINY: dict[str, dict[str, Any]] = {
    # Uneven on two ranks and on four: 67 words, 5 heads' worth of rows, 3 layers.
    "llama": {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 50, "num_layers": 3, "num_heads": 4}
    | {"num_kv_heads": 2, "head_dim": 6, "tie_embeddings": True, "max_position_embeddings": 32},
    "gpt2": {"vocab_size": 67, "hidden_size": 20, "intermediate_size": 44, "num_layers": 3, "num_heads": 2}
    | {"max_position_embeddings": 32},
}
PRESETS = {"llama": "llama-15m", "gpt2": "gpt2"}


def config(family: str) -> Any:
    drops = {"attn_dropout": 0.0, "resid_dropout": 0.0, "embd_dropout": 0.0} if family == "gpt2" else {}
    return preset(PRESETS[family], **TINY[family], **drops)


def divide(model: Decoder, layout: Layout, ranks: Ranks) -> Any:
    """In the order of the engine; the places of a pipeline's parts differ in what they hold."""
    mesh = make_mesh(layout, ranks)
    split_model(model, mesh.pipeline, layout.pipeline)
    apply_tensor(model, mesh.tensor)
    return apply_zero(model, mesh)


def differences(found: nn.Module, expected: nn.Module) -> list[str]:
    """Names of tensors that are not the same in place, type or bits."""
    mine, theirs = kept_tensors(found), kept_tensors(expected)
    if mine.keys() != theirs.keys():
        return [f"names: {sorted(mine.keys() ^ theirs.keys())}"]
    return [name for name in mine if not _same(mine[name], theirs[name])]


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        if a.placements != b.placements or a.shape != b.shape:
            return False
        a, b = a.to_local(), b.to_local()
    return a.dtype == b.dtype and torch.equal(a, b) and not isinstance(a, DTensor)


def loss_of_a_step(model: Decoder, parallel: Any, ranks: Ranks) -> list[float]:
    """Loss sums of two steps of gradient descent: hooks, collectives and gathered copies see the new storage."""
    ids = torch.randint(0, 67, (4, 13), generator=torch.Generator().manual_seed(3))
    rows = ids[parallel.mesh.rows[0] :: parallel.mesh.rows[1]]
    found = []
    for _ in range(2):
        loss = CausalLM().loss(model, {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}).loss_sum
        parallel.begin_backward(last=True)
        loss.backward()
        parallel.end_backward(last=True)
        found.append(float(ranks.sum_(loss.detach().double())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None
    return found


def check(rank: int, world: int, cases: list[tuple[str, Layout]]) -> list[list[str]]:
    ranks = start()
    problems = []
    for family, layout in cases:
        for dtype in (torch.float32, torch.bfloat16):
            whole = build_model(config(family), seed=5, dtype=dtype)
            meta = build_model(config(family), device="meta", dtype=dtype)
            expected, found = divide(whole, layout, ranks), divide(meta, layout, ranks)
            before = list(meta.parameters())
            materialise(meta, "cpu", initial_values(config(family), 5))
            wrong = differences(meta, whole)
            if any(a is not b for a, b in zip(before, meta.parameters(), strict=True)):
                wrong.append("other parameters")
            if any(t.is_meta for t in meta.state_dict().values()):
                wrong.append("still on meta")
            if dtype == torch.float32 and layout.pipeline.stages == 1 and not wrong:
                losses = loss_of_a_step(meta, found, ranks), loss_of_a_step(whole, expected, ranks)
                wrong += [f"losses {losses}"] if losses[0] != losses[1] else differences(meta, whole)
            found.close()
            expected.close()
            problems.append(wrong)
    return problems


def cases(world: int) -> list[tuple[str, Layout]]:
    pipeline = PipelineLayout(stages=2)
    layouts = {
        2: [
            Layout(2, 0, 1),
            Layout(2, 3, 2, gather="micro_batch"),
            Layout(2, 0, 1, tensor=2),
            Layout(2, 0, 1, pipeline=pipeline),
        ],
        4: [
            Layout(4, 3, 4),
            Layout(4, 1, 2),
            Layout(4, 3, 2, tensor=2),
            Layout(4, 0, 1, tensor=2),
            Layout(4, 2, 2, pipeline=pipeline),
            Layout(4, 0, 1, tensor=2, pipeline=pipeline),
        ],
    }
    return [(family, layout) for family in TINY for layout in layouts[world]]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_starts_from_the_same_bits(world: int) -> None:
    for rank, found in enumerate(run_ranks(check, world, cases(world), timeout=240)):
        for case, wrong in zip((c for c in cases(world) for _ in range(2)), found, strict=True):
            assert wrong == [], (rank, case)


@pytest.mark.parametrize("family", list(TINY))
def test_one_process_and_pretrained_weights(family: str, tmp_path: Path) -> None:
    whole = build_model(config(family), seed=5)
    meta = build_model(config(family), device="meta")
    asked: list[str] = []

    def value(name: str, shape: Any, dtype: torch.dtype) -> Tensor:
        asked.append(name)
        return initial_values(config(family), 5)(name, shape, dtype)

    materialise(meta, "cpu", value)
    assert asked == list(kept_tensors(whole)), "each once, tied ones by their first name"
    assert differences(meta, whole) == []
    assert (meta.head_weight is meta.embedding.weight) == config(family).tie_embeddings
    materialise(meta, "cpu", value)
    assert len(asked) == len(kept_tensors(whole)), "what has values keeps them"

    save_pretrained(whole, tmp_path)
    pretrained = Pretrained(tmp_path)
    assert pretrained.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        read = build_model(pretrained.config, device="meta", dtype=dtype)
        materialise(read, "cpu", pretrained.value)
        assert differences(read, load_pretrained(tmp_path, dtype=dtype)) == []


def read_parts(rank: int, world: int, folder: str) -> list[str]:
    """Weights of a folder into a sharded, tensor-divided model."""
    ranks = start()
    whole = load_pretrained(folder)
    pretrained = Pretrained(folder)
    meta = build_model(pretrained.config, device="meta")
    layout = Layout(world, 3, 2)
    divided = [divide(model, layout, ranks) for model in (whole, meta)]
    materialise(meta, "cpu", pretrained.value)
    wrong = differences(meta, whole)
    for parallel in divided:
        parallel.close()
    return wrong


def test_pretrained_weights_into_parts(tmp_path: Path) -> None:
    save_pretrained(build_model(config("llama"), seed=5), tmp_path)
    assert run_ranks(read_parts, 2, str(tmp_path)) == [[], []]


def test_what_cannot_be_known_is_refused() -> None:
    model = build_model(config("llama"), device="meta")
    with pytest.raises(ModelError, match=r"value of model.embed_tokens.weight is \[1\], expected \[67, 24\]"):
        materialise(model, "cpu", lambda name, shape, dtype: torch.zeros(1))
    model = build_model(config("llama"), device="meta")
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ModelError, match="no checkpoint holds: table"):
        materialise(model, "cpu", initial_values(config("llama"), 0))


def test_one_whole_parameter_at_a_time() -> None:
    """Values are let go before the next is asked for."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def value(name: str, shape: Any, dtype: torch.dtype) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        whole = torch.ones(tuple(shape), dtype=dtype)
        alive.append(weakref.ref(whole))
        return whole

    model = build_model(config("gpt2"), device="meta")
    parallel = apply_zero(model, make_mesh(Layout(1, 0, 1), ALONE))
    materialise(model, "cpu", value)
    assert len(alive) == len(kept_tensors(model))
    parallel.close()
