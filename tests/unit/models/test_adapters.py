"""Adapters on one process: what is trained and what is frozen, first values, merging, 4 bits, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.config.adapter_section import AdapterSection
from trainwright.engine.materialise import materialise
from trainwright.models import LlamaConfig, MoEConfig, build_model, initial_values
from trainwright.models.adapters import (
    AdapterOptions,
    AdapterReport,
    adapter_options,
    adapter_value,
    adapter_values,
    apply_adapter,
    load_adapter,
    merge_adapter,
    merged_source,
    save_adapter,
    saved_values,
)
from trainwright.models.adapters.nf4 import BLOCK, dequantise, nf4_bytes, quantise
from trainwright.models.adapters.saving import source_of
from trainwright.testing import tiny_llama_config, tiny_moe_config


def llama(**changes: Any) -> Any:
    return build_model(LlamaConfig(**tiny_llama_config(vocab_size=96, **changes)), seed=1)


def ids(rows: int = 3, length: int = 16) -> Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(2))


def disturb(model: Any, seed: int = 3) -> None:
    """Give B, and every other trained parameter, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_the_model_computes_what_it_did_and_trains_nothing_else(name: str) -> None:
    model = llama()
    before = model(ids())
    names = list(dict(model.named_parameters()))
    report = apply_adapter(model, AdapterOptions(name=name, rank=4))
    assert torch.equal(model(ids()), before)
    assert set(names) < set(dict(model.named_parameters())), "names of the model's own parameters stay"
    assert len(report.linears) == 14
    assert "lm_head" not in report.linears
    trained = [p for p in model.parameters() if p.requires_grad]
    assert report.trained == sum(p.numel() for p in trained) < 0.1 * report.total
    assert report.total == sum(p.numel() for p in model.parameters())
    model(ids()).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in parameter_name or "magnitude" in parameter_name)
        assert report.is_frozen(parameter_name) == (not parameter.requires_grad)


def test_scaling_of_the_methods() -> None:
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            AdapterOptions(alpha=alpha)
    assert AdapterOptions(rank=16, alpha=32.0).scaling == 2.0
    assert AdapterOptions(name="rslora", rank=16, alpha=32.0).scaling == 8.0


def test_targets_and_what_is_trained_beside_them() -> None:
    model = llama()
    report = apply_adapter(model, AdapterOptions(rank=2, targets=(r"1\..*(q|v)_proj",), train=("norm", "embed")))
    assert list(report.linears) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert model.model.norm.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
    assert "2 linears, 6 parameters as they are" in str(report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("q_porj",)}, "q_proj"),
        ({"targets": ("lm_head",)}, "the head"),
        ({"train": ("nrom",)}, "near names"),
        ({"train": ("q_proj",)}, "that has an adapter"),
    ],
)
def test_patterns_that_name_nothing_or_the_wrong_thing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_adapter(llama(), AdapterOptions(rank=2, **options))
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_matrices_of_experts_are_refused_and_the_other_linears_adapted() -> None:
    config = MoEConfig(**tiny_moe_config(vocab_size=96))
    with pytest.raises(ConfigError, match="matrices of experts"):
        apply_adapter(build_model(config), AdapterOptions(targets=("experts",)))
    report = apply_adapter(build_model(config), AdapterOptions(rank=2))
    assert {name.rpartition(".")[2] for name in report.linears} >= {"q_proj", "o_proj"}
    assert not any("experts" in name for name in report.linears)


def test_a_second_adapter_is_refused() -> None:
    model = llama()
    apply_adapter(model, AdapterOptions(rank=2))
    with pytest.raises(ModelError, match="has adapters already"):
        apply_adapter(model, AdapterOptions(rank=2))


def test_first_values_are_functions_of_names() -> None:
    one = adapter_value("a.lora_A", (4, 100), torch.float32, 0)
    assert one is not None
    again, other, seeded = (
        adapter_value(name, (4, 100), torch.float32, seed)
        for name, seed in (("a.lora_A", 0), ("b.lora_A", 0), ("a.lora_A", 1))
    )
    assert again is not None
    assert other is not None
    assert seeded is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, seeded)
    assert 0.09 < float(one.abs().max()) <= 0.1, "uniform within 1 / sqrt(in)"
    zeros = adapter_value("a.lora_B", (100, 4), torch.bfloat16, 0)
    assert zeros is not None
    assert zeros.dtype == torch.bfloat16
    assert not zeros.any()
    assert adapter_value("a.weight", (4, 4), torch.float32, 0) is None


@pytest.mark.parametrize("base", ["as_is", "bf16", "nf4"])
def test_on_the_meta_device_values_come_by_name_and_are_the_same(base: Any) -> None:
    config = LlamaConfig(**tiny_llama_config(vocab_size=96))
    options = AdapterOptions(name="dora", rank=4, base=base)
    here = build_model(config, seed=1)
    apply_adapter(here, options, seed=5)
    there = build_model(config, device="meta")
    report = apply_adapter(there, options)
    materialise(there, "cpu", adapter_values(report.linears, initial_values(config, 1), seed=5))
    for (name, mine), (other, theirs) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert name == other
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), name
        assert mine.requires_grad == theirs.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["as_is", "fp32", "bf16", "fp16", "nf4"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_types_may_be_mixed(name: str, base: Any, dtype: torch.dtype, autocast: bool) -> None:
    model = llama().to(dtype)
    apply_adapter(model, AdapterOptions(name=name, rank=4, base=base))
    disturb(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids())
    assert logits.dtype == (torch.bfloat16 if autocast else dtype)
    logits.float().square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all()
    opened = merge_adapter(model)(ids())
    assert float((opened.float() - logits.float()).norm() / opened.float().norm()) < (
        1e-5 if dtype == torch.float32 and not autocast else 5e-2
    )


def test_rows_of_zeros_have_no_length_to_divide_by() -> None:
    model = llama()
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.q_proj):
            linear.weight[3:9] = 0.0
    before = model(ids())
    apply_adapter(model, AdapterOptions(name="dora", rank=4))
    assert torch.equal(model(ids()), before)
    losses = memorise(model)
    assert losses[-1] < losses[0] - 0.5
    expected = model(ids())
    assert expected.isfinite().all()
    assert float((merge_adapter(model)(ids()) - expected).abs().max()) < 1e-5


# --- merging ---


@pytest.mark.parametrize("base", ["as_is", "nf4"])
@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_merged_computes_what_unmerged_does(name: str, base: Any) -> None:
    model = llama(qkv_bias=True, architecture="qwen2").eval()
    names = list(dict(model.named_parameters()))
    report = apply_adapter(model, AdapterOptions(name=name, rank=4, base=base))
    disturb(model)
    expected = model(ids())
    source = merged_source(report, source_of(model))
    plain = llama(qkv_bias=True, architecture="qwen2").eval()
    assert set(source.shapes) == set(names)
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            rows = source.shapes[parameter_name][0]
            half = rows // 2
            parts = [source.read(parameter_name, 0, half), source.read(parameter_name, half, rows - half)]
            parameter.copy_(torch.cat(parts))
    assert float((plain(ids()) - expected).abs().max()) < 1e-5
    merge_adapter(model)
    assert list(dict(model.named_parameters())) == names
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert float((model(ids()) - expected).abs().max()) < 1e-5
    with pytest.raises(ModelError, match="no adapters"):
        merge_adapter(model)
    apply_adapter(model, AdapterOptions(rank=2))


def test_saved_and_loaded_is_the_same_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = llama()
    apply_adapter(model, AdapterOptions(rank=4, targets=("q_proj",), train=("norm",)))
    disturb(model)
    save_adapter(model, tmp_path / "adapter", base="somewhere")
    again = llama()
    report = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids()), model(ids()))
    assert AdapterReport.from_fields(report.to_fields()) == report
    with pytest.raises(ModelError, match="expected"):
        load_adapter(llama(hidden_size=32), tmp_path / "adapter")
    with pytest.raises(ModelError, match="no linear"):
        load_adapter(llama(num_layers=1), tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert values["base_model_name_or_path"] == "somewhere"
    for change, said in (({"peft_type": "IA3"}, "IA3"), ({"rank_pattern": {"q": 1}}, "rank_pattern")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ModelError, match=said):
            load_adapter(llama(), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model"):
        load_adapter(llama(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {}}, None),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"init_lora_weights": "lora_ga"}, "changed the base"),
        ({"init_lora_weights": "eva"}, None),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True, "use_rslora": True}, "root of the rank"),
        ({"r": None}, "expected numbers"),
        ({"lora_alpha": "high"}, "expected numbers"),
        ({"r": 5}, "expected"),
    ],
)
def test_forms_of_peft_are_read_or_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], said: str | None
) -> None:
    model = llama()
    apply_adapter(model, AdapterOptions(rank=4))
    disturb(model)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    again = llama()
    if said is None:
        load_adapter(again, tmp_path)
        assert torch.equal(again(ids()), model(ids()))
        return
    with pytest.raises(ModelError, match=said):
        load_adapter(again, tmp_path)
    assert torch.equal(again(ids()), llama()(ids())), "where the file does not fit, nothing is changed"
    apply_adapter(again, AdapterOptions(rank=2))


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapters: it has no adapter_config\.json"):
        load_adapter(llama(), tmp_path)
    model = llama()
    apply_adapter(model, AdapterOptions(rank=4))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for part in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            load_adapter(llama(), tmp_path)
    tensors = load(whole)
    for leaf in ("lora_A", "lora_B"):
        lost = f"base_model.model.model.layers.0.mlp.up_proj.{leaf}.weight"
        path.write_bytes(save({name: value for name, value in tensors.items() if name != lost}))
        with pytest.raises(ModelError, match=f"1 missing: {lost}"):
            load_adapter(llama(), tmp_path)
    path.write_bytes(save({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)}))
    with pytest.raises(ModelError, match="no adapters beside linears"):
        load_adapter(llama(), tmp_path)
    path.write_bytes(save({name.replace("q_proj", "lm_head"): value for name, value in tensors.items()}))
    with pytest.raises(ModelError, match="no linear"):
        load_adapter(llama(), tmp_path)
    path.write_bytes(save({f"base_model.model.lm_head.lora_{ab}.weight": torch.zeros(4, 4) for ab in "AB"}))
    with pytest.raises(ModelError, match="beside the head lm_head"):
        load_adapter(llama(), tmp_path)


def test_a_model_goes_on_from_a_folder(tmp_path: Path) -> None:
    trained = llama()
    apply_adapter(trained, AdapterOptions(rank=4))
    disturb(trained)
    save_adapter(trained, tmp_path)
    config = LlamaConfig(**tiny_llama_config(vocab_size=96))
    model = build_model(config, device="meta")
    report = apply_adapter(model, AdapterOptions(rank=4))
    saved = saved_values(model, tmp_path)
    materialise(model, "cpu", adapter_values(report.linears, initial_values(config, 1), seed=0, saved=saved))
    assert torch.equal(model(ids()), trained(ids()))
    for other in (AdapterOptions(rank=8), AdapterOptions(name="rslora", rank=4), AdapterOptions(rank=4, alpha=1.0)):
        model = build_model(config, device="meta")
        apply_adapter(model, other)
        with pytest.raises(ModelError, match="expected"):
            saved_values(model, tmp_path)
    model = build_model(config, device="meta")
    apply_adapter(model, AdapterOptions(rank=4, targets=("q_proj",)))
    with pytest.raises(ModelError, match="not of this model"):
        saved_values(model, tmp_path)


# --- 4 bits ---


def test_codes_of_4_bits_round_to_the_nearest_level_and_take_few_bytes() -> None:
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0.0
    packed = quantise(weight)
    opened = dequantise(packed, torch.float32)
    assert opened.shape == weight.shape
    assert not opened[3].any()
    error = float((opened - weight).norm() / weight.norm())
    assert 0.05 < error < 0.1, "of a normal distribution"
    # The widest gap between levels is 0.304 of a block's magnitude, near -1; half of it, and the rounded magnitude.
    blocks = torch.nn.functional.pad(weight, (0, -200 % BLOCK)).view(96, -1, BLOCK)
    bound = (0.153 * blocks.abs().amax(-1, keepdim=True) + 0.003 * weight.abs().amax(1)[:, None, None]).expand_as(
        blocks
    )
    assert bool(((opened - weight).abs() <= bound.reshape(96, -1)[:, :200] + 1e-9).all())
    assert sum(part.numel() * part.element_size() for part in packed) == nf4_bytes(96, 200)
    assert nf4_bytes(4096, 4096) / (2 * 4096 * 4096) < 0.26
    assert torch.equal(torch.cat([part.codes for part in (quantise(weight[:40]), quantise(weight[40:]))]), packed.codes)


@pytest.mark.parametrize("columns", [2, 62, 64, 66, 128, 130])
def test_4_bits_of_sizes_that_the_block_does_not_divide(columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, columns, generator=generator)
    weight[1] *= 1e-20
    weight[2] = 3.0
    weight[3, -1] = -100.0  # one number that is far from the others
    opened = dequantise(quantise(weight), torch.float32)
    assert opened.shape == weight.shape
    assert opened.isfinite().all()
    assert torch.allclose(opened[2], weight[2], rtol=1e-6)
    assert float(opened[3, -1]) == pytest.approx(-100.0, rel=1e-6)
    error = (opened - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(error[:3].max()) < 0.16, "short rows and small ones are as near as others"
    rounded = dequantise(quantise(weight.bfloat16()), torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    again = dequantise(quantise(opened), torch.float32)
    assert float((again - opened).abs().max()) <= 2e-2 * float(opened.abs().max()), "levels are met again"


def test_magnitudes_of_4_bits_outlive_a_gather_in_bf16() -> None:
    """As under ZeRO with mixed precision, which casts what floats."""
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(2)) * torch.logspace(-8, 3, 40)[:, None]
    packed = quantise(weight)
    cast = packed._replace(range=packed.range.bfloat16().float())
    assert torch.equal(dequantise(cast, torch.float32), dequantise(packed, torch.float32))
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((packed.range >= largest) & (packed.range <= largest * (1 + 2**-7))).all())


def test_matrices_that_are_too_narrow_stay_as_they_are() -> None:
    model = llama(hidden_size=32, intermediate_size=66, head_dim=8)
    before = model(ids())
    report = apply_adapter(model, AdapterOptions(rank=4, base="nf4"))
    held = {name.rpartition(".")[2]: shape.base for name, shape in report.linears.items()}
    assert held["q_proj"] == "as_is"
    assert held["down_proj"] == "nf4"
    after = model(ids())
    assert 0 < float((after - before).abs().max()) < 0.2 * float(before.abs().max())
    assert float((merge_adapter(model)(ids()) - after).abs().max()) < 1e-5


def test_4_bits_are_those_of_torchao_but_for_the_rounding_of_magnitudes() -> None:
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    theirs = module.NF4Tensor.from_tensor(weight, BLOCK, 256).get_original_weight()
    ours = dequantise(quantise(weight), torch.float32)
    assert float((ours - theirs).norm() / weight.norm()) < 0.02
    errors = [float((value - weight).norm() / weight.norm()) for value in (ours, theirs)]
    assert errors[0] < 1.02 * errors[1]


def test_qlora_trains_over_a_base_that_takes_three_tenths_of_bf16() -> None:
    torch.manual_seed(0)
    model = llama(hidden_size=128, intermediate_size=256, head_dim=32)
    plain = llama(hidden_size=128, intermediate_size=256, head_dim=32)
    report = apply_adapter(model, AdapterOptions(rank=8, base="nf4"))
    assert report.base_bytes <= 0.30 * report.base_bytes_bf16
    held = [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in report.linears and "lora" not in name
    ]
    assert report.base_bytes == sum(p.numel() * p.element_size() for p in held)
    with torch.no_grad():  # what it computes is what the opened weights compute
        for name in report.linears:
            opened = model.get_submodule(name).weight_rows(0, 1 << 20)
            plain.get_submodule(name).weight.copy_(opened)
    assert float((model(ids()) - plain(ids())).abs().max()) < 1e-5
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    apply_adapter(plain, AdapterOptions(rank=8))
    in_4_bits, in_fp32 = memorise(model), memorise(plain)
    assert in_4_bits[-1] < in_4_bits[0] - 1.0
    assert abs(in_4_bits[-1] / in_fp32[-1] - 1) < 1e-3, "over the same weights, opened"
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def memorise(model: Any, steps: int = 20) -> list[float]:
    """Losses of steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids())[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_the_backward_pass_keeps_no_opened_weight() -> None:
    model = llama(hidden_size=128, intermediate_size=256, head_dim=32)
    apply_adapter(model, AdapterOptions(rank=8, base="nf4"))
    linear = model.model.layers[0].mlp.gate_proj
    saved: list[Tensor] = []
    x = torch.randn(2, 5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = linear(x)
    assert max(tensor.numel() for tensor in saved if tensor.is_floating_point()) <= 256 * 8
    out.sum().backward()
    assert x.grad is not None
    opened = linear.weight_rows(0, 1 << 20)
    expected = torch.ones(2, 5, 256) @ (opened + linear.scaling * linear.lora_B @ linear.lora_A)
    assert torch.allclose(x.grad, expected, atol=1e-5)


# --- recipes ---


def test_what_a_recipe_says() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    assert adapter_options(AdapterSection(), bf16) == AdapterOptions(base="bf16")
    assert adapter_options(AdapterSection(), fp32) == AdapterOptions(base="as_is")
    assert adapter_options(AdapterSection(name="qlora", rank=8), bf16) == AdapterOptions(rank=8, base="nf4")
    assert adapter_options(AdapterSection(name="dora", base="nf4"), fp32) == AdapterOptions(name="dora", base="nf4")
    with pytest.raises(ValueError, match="auto or nf4 beside name: qlora"):
        AdapterSection(name="qlora", base="bf16")
    with pytest.raises(ValueError, match="peft_type"):
        AdapterSection(name="peft")
    with pytest.raises(ValueError, match=r"adapter\.config says it"):
        AdapterSection(name="peft", rank=4, config={"peft_type": "IA3"})
