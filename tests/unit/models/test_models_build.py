"""Configurations, presets, initial weights, counting and the plan."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.models import (
    LlamaConfig,
    build_model,
    check_vocabulary,
    config_from_dict,
    count_flops,
    count_matmul_parameters,
    count_parameters,
    initial_value,
    materialize,
    model_plan,
    preset,
    presets,
)
from trainwright.models.counting import visible_keys
from trainwright.models.fields import config_fields, config_from_fields

# Parameter counts that the model cards publish.
PUBLISHED = {
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "llama-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-1m", 1.3),
        ("llama-5m", 5),
        ("llama-15m", 15.5),
        ("llama-34m", 33.7),
        ("llama-60m", 60),
        ("llama-125m", 124),
        ("llama-350m", 341),
    ],
)
def test_own_sizes_are_what_their_names_say(name: str, millions: float) -> None:
    assert count_parameters(preset(name)) / 1e6 == pytest.approx(millions, rel=0.02)


def test_nanogpt_size() -> None:
    """nanoGPT prints 0.80M for this run; it leaves out the position embedding."""
    nano = preset("gpt2-nano")
    assert count_parameters(nano) - nano.max_position_embeddings * nano.hidden_size == pytest.approx(0.80e6, rel=0.01)


@pytest.mark.parametrize("name", presets())
def test_config_survives_its_json(name: str) -> None:
    assert config_from_dict(preset(name).to_hf()) == preset(name)


def test_weights_depend_on_name_and_seed_only() -> None:
    config = preset("llama-1m")
    deep = dataclasses.replace(config, num_layers=2)
    one, two = build_model(config, seed=7), build_model(config, seed=7)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        assert torch.equal(value, initial_value_of(config, name, value.shape, 7)), name
    other = build_model(deep, seed=7).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(other[name], one.state_dict()[name]), "depth changes residual scale only"
    assert not torch.equal(build_model(config, seed=8).state_dict()[name], one.state_dict()[name])


def initial_value_of(config: LlamaConfig, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    name = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_embeddings else name
    return initial_value(name, shape, config, seed)


@pytest.mark.parametrize("name", ["llama-5m", "gpt2-nano"])
def test_initial_scale(name: str) -> None:
    model = build_model(preset(name))
    layers = model.config.num_layers
    for key, value in model.named_parameters():
        if value.dim() == 1:
            assert torch.equal(value, torch.zeros_like(value) if key.endswith("bias") else torch.ones_like(value))
            continue
        residual = key.endswith(("o_proj.weight", "down_proj.weight", ".c_proj.weight"))
        expected = 0.02 / math.sqrt(2 * layers) if residual else 0.02
        assert value.std().item() == pytest.approx(expected, rel=0.05), key


def test_meta_then_materialize_equals_direct() -> None:
    config = preset("llama-1m")
    shapes = build_model(config, device="meta")
    assert all(parameter.is_meta for parameter in shapes.parameters())
    model, direct = materialize(shapes, "cpu", seed=3), build_model(config, seed=3)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert model.lm_head.weight is model.model.embed_tokens.weight, "still tied"


def test_dtype_is_a_rounding_of_the_same_weights() -> None:
    config = preset("llama-1m")
    for (_, low), (_, full) in zip(
        build_model(config, dtype=torch.bfloat16).named_parameters(),
        build_model(config).named_parameters(),
        strict=True,
    ):
        assert torch.equal(low, full.bfloat16())


@pytest.mark.parametrize("name", ["llama-1m", "llama-34m", "qwen3-0.6b", "mistral-7b", "gpt2-nano", "gpt2"])
def test_plan_names_exist_and_divide(name: str) -> None:
    config = preset(name)
    model, plan = build_model(config, device="meta"), model_plan(config)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    assert modules[plan.blocks] is model.blocks
    assert len(model.blocks) == plan.num_blocks
    assert modules[plan.embedding] is model.embedding
    for part in (plan.final_norm, plan.head, plan.position_embedding):
        assert part is None or part in modules
    for kept, alias in plan.tied:
        assert parameters[kept] is parameters[alias]
    block = modules[f"{plan.blocks}.0"]
    linears = {key for key, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {linear.name for linear in plan.linears}, "every linear of a block is planned"
    for linear in plan.linears:
        weight = block.get_submodule(linear.name).weight
        size = weight.shape[0] if linear.kind == "column" else weight.shape[1]
        assert size % linear.units == 0
    one_dimensional = {key.rpartition(".")[0] for key, value in block.named_parameters() if value.dim() == 1}
    assert set(plan.norms) == one_dimensional - linears
    assert all(key in dict(block.named_modules()) for key in plan.cheap)


def test_flops_match_a_count_by_hand() -> None:
    config = preset("llama-34m")
    matrices = 8 * (4 * 512 * 512 + 3 * 512 * 1376) + 8192 * 512
    assert count_matmul_parameters(config) == matrices
    assert count_flops(config, 512) == pytest.approx(6 * matrices + 8 * 12 * 512 * 256.5)
    assert count_matmul_parameters(preset("llama-1m")) > count_parameters(preset("llama-1m")) - 128 * 4096 - 2000


def test_flops_match_torch_counter() -> None:
    """torch counts the matrix products it runs; without attention the two agree exactly."""
    from torch.utils.flop_counter import FlopCounterMode

    config = preset("llama-1m")
    model = build_model(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    ours = count_flops(config, 1)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(("length", "window"), [(10, None), (10, 3), (3, 10), (1, 1), (64, 64)])
def test_visible_keys_by_enumeration(length: int, window: int | None) -> None:
    counts = [min(position + 1, window or length) for position in range(length)]
    assert visible_keys(length, window) == pytest.approx(sum(counts) / length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads=3"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"rotary_layout": "spiral"}, "rotary_layout='spiral'"),
        ({"qk_norm": True}, "cannot have qk_norm=True"),
        ({"sliding_window": 8}, "cannot have sliding_window=8"),
        ({"qkv_bias": True}, "cannot have output_bias=False"),
        ({"architecture": "falcon"}, "architecture='falcon'"),
        ({"architecture": "mistral", "sliding_window": 8, "sliding_layers": (1,)}, "slides in every layer"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5"),
        ({"vocab_sise": 9}, "no field 'vocab_sise'"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        preset("llama-1m", **changes)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="llama-34m"):
        preset("lama-34m")


def test_tokenizer_larger_than_model_is_refused() -> None:
    check_vocabulary(100, 100)
    check_vocabulary(128, 100)
    with pytest.raises(ModelError, match=r"tokenizer has 101 tokens .* vocabulary holds 100"):
        check_vocabulary(100, 101)


def test_gpt2_dropout_is_active_in_training_only() -> None:
    config = preset("gpt2-nano", embd_dropout=0.0, attn_dropout=0.5, resid_dropout=0.0, initializer_range=0.2)
    model = build_model(config)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        quiet = build_model(preset("gpt2-nano", initializer_range=0.2)).eval()(ids)
        torch.testing.assert_close(model.eval()(ids), quiet, rtol=0, atol=0)
        torch.manual_seed(0)
        samples = torch.stack([model.train()(ids) for _ in range(2)])
    assert not torch.allclose(samples[0], samples[1])
    assert torch.isfinite(samples).all()


def test_dropout_path_without_drops_equals_attention() -> None:
    """The plain path used under dropout has the same mask as the operator: documents, window and padding."""
    from trainwright.models.attention import attend
    from trainwright.models.dropout import KeptWeights
    from trainwright.ops.attention import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 8, generator=generator) for heads in (4, 2, 2))
    owners = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2, dtype=torch.int32)
    arguments = {"document_ids": owners, "key_mask": None, "cache": None, "window": 3, "dropout": 1e-12}
    expected = attention(q, k, v, document_ids=owners, window=3)
    torch.testing.assert_close(attend(q, k, v, **arguments), expected, rtol=1e-5, atol=1e-6)
    all_kept = KeptWeights(0.0, torch.zeros(2, 9, dtype=torch.int64), torch.arange(9))
    torch.testing.assert_close(attend(q, k, v, **arguments, kept=all_kept), expected, rtol=1e-5, atol=1e-6)


def test_learned_positions_are_not_exceeded() -> None:
    model = build_model(preset("gpt2-nano"))
    with pytest.raises(ModelError, match="65 positions, but this model has learned 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("name", presets())
def test_config_survives_its_fields(name: str) -> None:
    """What a checkpoint carries along: plain JSON, equal again."""
    values = json.loads(json.dumps(config_fields(preset(name))))
    assert config_from_fields(values) == preset(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "family None is unknown"),
        ({"family": "llama", "vocab_size": 5}, "needs hidden_size"),
        ({"family": "gpt2", "vocab_sice": 5}, "vocab_size"),
        ({**config_fields(preset("llama-1m")), "rope_scaling": {"kidn": "yarn"}}, "rope_scaling: .*kidn"),
    ],
)
def test_bad_fields_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_fields(values)


@pytest.mark.parametrize("name", ["llama-1m", "gpt2-nano"])
def test_autocast_is_near_fp32(name: str) -> None:
    config = dataclasses.replace(preset(name), initializer_range=0.05)
    model = build_model(config).eval()
    ids = torch.randint(0, 65, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02
