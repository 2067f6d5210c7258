"""Adapters compute what peft computes on the transformers twin of the same weights; each opens the other's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.models import GPT2Config, LlamaConfig, build_model, load_pretrained, save_pretrained
from trainwright.models.adapters import AdapterOptions, apply_adapter, load_adapter, save_adapter
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TOLERANCE = 1e-5


def base(folder: Path, family: str = "llama") -> Path:
    """A folder of a small model with random weights, some biases among them."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(**tiny_llama_config(vocab_size=97, qkv_bias=True, architecture="qwen2"))
    if family == "gpt2":
        config = GPT2Config(**tiny_gpt2_config(vocab_size=97, resid_dropout=0.0, attn_dropout=0.0, embd_dropout=0.0))
    model = build_model(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return save_pretrained(model, folder)


def ids() -> Tensor:
    return torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(3))


def ours(folder: Path, **options: Any) -> Any:
    """The native model with adapters whose B is not zero."""
    model = load_pretrained(folder)
    apply_adapter(model, AdapterOptions(rank=4, alpha=8.0, **options), seed=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def theirs(folder: Path, adapter: Path, *, trained: bool = True) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trained).float()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def pairs(native: Any, twin: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, peft's) of every trained parameter; rows of gpt2's fused projection in the order of the file."""
    from trainwright.models.adapters.names import FileNames

    names = FileNames(native.config)
    found = dict(twin.named_parameters())
    made = []
    for name, parameter in native.named_parameters():
        if parameter.requires_grad:
            module, _, leaf = name.rpartition(".")
            linear = native.get_submodule(module)
            shape = (linear.out_features, linear.in_features)
            key = (
                f"base_model.model.{module}."
                + {
                    "lora_A": "lora_A.default.weight",
                    "lora_B": "lora_B.default.weight",
                    "magnitude": "lora_magnitude_vector.default.weight",
                }[leaf]
            )
            grad = parameter.grad
            made.append((name, parameter, found[key]))
            assert grad is not None
            assert apart(names.to_file(module, shape, leaf, grad), found[key].grad) < TOLERANCE * 10, name
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_forward_gradients_and_ten_steps_equal_peft(tmp_path: Path, method: str, family: str) -> None:
    folder = base(tmp_path / "base", family)
    native = ours(folder, name=method)
    save_adapter(native, tmp_path / "adapter", base=str(folder))
    twin = theirs(folder, tmp_path / "adapter")
    native.train()
    twin.train()
    if family == "gpt2":
        for module in twin.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    tokens = ids()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
        for model in (native, twin)
    ]
    for step in range(10):
        one, other = native(tokens), twin(input_ids=tokens).logits
        assert apart(one, other) < TOLERANCE * (1 + step), (step, apart(one, other))
        for model_loss in (loss_of(one, tokens), loss_of(other, tokens)):
            model_loss.backward()
        if step == 0:
            made = pairs(native, twin)
            kinds = {"lora_A", "lora_B", "magnitude"} if method == "dora" else {"lora_A", "lora_B"}
            assert {name.rpartition(".")[2] for name, _, _ in made} == kinds
            frozen = [p for p in native.parameters() if not p.requires_grad]
            assert frozen
            assert all(p.grad is None for p in frozen)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert float(loss_of(native(tokens), tokens)) < 4.0, "it has learned something"


@pytest.mark.parametrize("method", METHODS)
def test_files_of_peft_open_here_and_ours_there(tmp_path: Path, method: str) -> None:
    folder = base(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens"], **METHODS[method]
    )
    twin = peft.get_peft_model(model, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for _, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    twin.save_pretrained(tmp_path / "theirs")
    native = load_pretrained(folder)
    report = load_adapter(native, tmp_path / "theirs")
    assert report.options.name == method
    assert len(report.linears) == 4
    assert report.extra == ("model.embed_tokens.weight",)
    tokens = ids()
    expected = twin.eval()(input_ids=tokens).logits
    assert apart(native(tokens), expected) < TOLERANCE
    save_adapter(native, tmp_path / "ours", base=str(folder))
    again = theirs(folder, tmp_path / "ours", trained=False).eval()
    assert apart(again(input_ids=tokens).logits, expected) < TOLERANCE
    reopened = load_pretrained(folder)
    load_adapter(reopened, tmp_path / "ours")
    assert torch.equal(reopened(tokens), native(tokens)), "saved and loaded"


def test_interleaved_rotations_are_reordered_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=97, rotary_layout="interleaved")), seed=1)
    save_pretrained(model, tmp_path / "base")
    apply_adapter(model, AdapterOptions(name="dora", rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "magnitude")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, tmp_path / "adapter")
    tokens = ids()
    twin = theirs(tmp_path / "base", tmp_path / "adapter", trained=False).eval()
    assert apart(twin(input_ids=tokens).logits, model.eval()(tokens)) < TOLERANCE
    again = build_model(model.config, seed=1)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(tokens), model(tokens))
