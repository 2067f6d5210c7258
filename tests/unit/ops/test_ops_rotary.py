"""Rotary tables and turns against transformers, and by their defining property."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.ops.rotary import RotaryScaling, apply_rotary, rotary_tables

SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "beta_fast": 16,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [50, 300])
def test_tables_equal_those_of_transformers(name: str, length: int) -> None:
    transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", **values, "rope_theta": 50000.0},
    )
    position_ids = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), position_ids)
    scaling = RotaryScaling.from_hf(values, max_positions=128)
    ours = rotary_tables(32, position_ids, 50000.0, scaling)
    for left, right in zip(ours, (cos, sin), strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right[..., :16], rtol=0, atol=1e-6)
        torch.testing.assert_close(left, right[..., 16:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_survives_the_way_to_hugging_face_and_back(name: str) -> None:
    scaling = RotaryScaling.from_hf(SCALINGS[name], max_positions=128)
    back = RotaryScaling.from_hf(scaling.to_hf(), max_positions=128)
    for ours, theirs in zip(rotary_tables(32, 200, scaling=scaling), rotary_tables(32, 200, scaling=back), strict=True):
        assert torch.equal(ours, theirs)


def test_turn_equals_transformers() -> None:
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    cos, sin = rotary_tables(16, torch.arange(9).expand(2, 9))
    ours = apply_rotary(q, k, cos, sin)
    doubled = [torch.cat((table, table), -1) for table in (cos, sin)]
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *doubled)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distance_only(layout: Any) -> None:
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)

    def score(at: int, other: int) -> float:
        turned_q, _ = apply_rotary(q, k, *rotary_tables(32, torch.tensor([[at]])), layout=layout)
        _, turned_k = apply_rotary(q, k, *rotary_tables(32, torch.tensor([[other]])), layout=layout)
        return float((turned_q * turned_k).sum())

    assert score(12, 5) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(12, 5) - score(12, 9)) > 1e-3


def test_layouts_are_the_same_turn_of_permuted_channels() -> None:
    x = torch.randn(1, 7, 2, 8)
    cos, sin = rotary_tables(8, 7)
    order = torch.arange(8).view(4, 2).t().flatten()
    interleaved, _ = apply_rotary(x, x, cos, sin, "interleaved")
    half, _ = apply_rotary(x[..., order], x[..., order], cos, sin, "half")
    torch.testing.assert_close(interleaved[..., order], half)


def test_positions_restart_with_each_document() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    cos, _ = rotary_tables(8, position_ids)
    assert torch.equal(cos[0, 3:], cos[0, :2])


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ModelError, match="rotary scaling"):
        RotaryScaling(kind="magic")
    with pytest.raises(ModelError, match="pretraining"):
        RotaryScaling(kind="llama3", factor=8.0)
    with pytest.raises(ModelError, match="layout"):
        apply_rotary(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), *rotary_tables(4, 1), layout="sideways")  # type: ignore[arg-type]
