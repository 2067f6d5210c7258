"""Adapters compute what peft computes on the transformers twin of the same weights; each opens the other's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models import (
    BertConfig,
    GPT2Config,
    HeadSpec,
    LlamaConfig,
    attach_head,
    build_model,
    load_pretrained,
    save_pretrained,
)
from trainwright.models.adapters import AdapterOptions, apply_adapter, load_adapter, merge_adapter, save_adapter
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


# --- names that differ between our model, its folder and peft ---

BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
LLAMA = LlamaConfig(**tiny_llama_config(vocab_size=97))
ROBERTA = {**BERT, "architecture": "roberta", "pad_token_id": 1, "type_vocab_size": 1}


def disturb(model: Any, seed: int = 5) -> None:
    """Give every trained parameter values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def text_ids() -> Tensor:
    """Tokens that are no padding of RoBERTa, which counts positions by that."""
    return torch.randint(5, 97, (3, 9), generator=torch.Generator().manual_seed(3))


def stacked(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return torch.stack((output.start_logits, output.end_logits), -1) if logits is None else logits


@pytest.mark.parametrize(
    ("config", "head", "kind"),
    [
        (BertConfig(**BERT), None, "AutoModelForMaskedLM"),
        (BertConfig(**ROBERTA), None, "AutoModelForMaskedLM"),
        (BertConfig(**ROBERTA), HeadSpec("token", ("O", "人名")), "AutoModelForTokenClassification"),
        (BertConfig(**BERT), HeadSpec("sequence", ("a", "b", "c")), "AutoModelForSequenceClassification"),
        (LlamaConfig(**tiny_llama_config(vocab_size=97)), HeadSpec("span"), "AutoModelForQuestionAnswering"),
        (
            LlamaConfig(**tiny_llama_config(vocab_size=97)),
            HeadSpec("token", ("O", "B")),
            "AutoModelForTokenClassification",
        ),
    ],
    ids=["bert", "roberta", "roberta-token", "bert-sequence", "llama-span", "llama-token"],
)
def test_peft_opens_adapters_of_every_folder_layout(tmp_path: Path, config: Any, head: Any, kind: str) -> None:
    model = build_model(config, seed=1).eval()
    if head is not None:
        attach_head(model, head, seed=1)
    save_pretrained(model, tmp_path / "base")
    apply_adapter(model, AdapterOptions(rank=4))
    disturb(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    tokens = text_ids()
    with torch.no_grad():
        expected = model(tokens) if head is None else model.scores({"input_ids": tokens})
        twin = getattr(transformers, kind).from_pretrained(tmp_path / "base", attn_implementation="eager")
        twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
        assert apart(stacked(twin(input_ids=tokens, attention_mask=torch.ones_like(tokens))), expected) < TOLERANCE
        again = load_pretrained(tmp_path / "base")
        load_adapter(again, tmp_path / "adapter")
        found = again(tokens) if head is None else again.scores({"input_ids": tokens})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_that_peft_trained_opens_here(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    config = transformers.AutoConfig.for_model(kind, **sizes, intermediate_size=48, pad_token_id=1)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config)
    theirs.save_pretrained(tmp_path / "base")
    twin = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    disturb(twin)
    twin.save_pretrained(tmp_path / "theirs")
    tokens = text_ids()
    model = load_pretrained(tmp_path / "base")
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        expected = twin.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        assert apart(model.scores({"input_ids": tokens}), expected) < TOLERANCE
    save_pretrained(build_model(BertConfig(**(BERT if kind == "bert" else ROBERTA)), seed=1), tmp_path / "words")
    with pytest.raises(ModelError, match="do not fit") as raised:
        load_adapter(load_pretrained(tmp_path / "words"), tmp_path / "theirs")
    assert "head of a task" in str(raised.value.hint)


def test_an_embedding_that_is_the_output_head_too(tmp_path: Path) -> None:
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=97, tie_embeddings=True)), seed=1)
    folder = save_pretrained(model, tmp_path / "base")
    apply_adapter(model, AdapterOptions(rank=4, train=("embed_tokens",)))
    disturb(model)
    save_adapter(model, tmp_path / "ours", base=str(folder))
    tokens = ids()
    assert apart(theirs(folder, tmp_path / "ours", trained=False).eval()(input_ids=tokens).logits, model(tokens)) < 1e-5
    again = load_pretrained(folder)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(tokens), model(tokens))

    untied = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    twin = peft.get_peft_model(untied, config)  # copies the embedding and leaves the head what it was
    disturb(twin)
    twin.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="trained apart from"):
        load_adapter(load_pretrained(folder), tmp_path / "theirs")


@pytest.mark.parametrize("rank", [1, 200])
def test_ranks_of_one_and_beyond_the_sizes_of_the_matrix(tmp_path: Path, rank: int) -> None:
    folder = base(tmp_path / "base")
    native = load_pretrained(folder)
    apply_adapter(native, AdapterOptions(name="rslora", rank=rank, alpha=3.5))
    disturb(native)
    save_adapter(native, tmp_path / "adapter", base=str(folder))
    twin = theirs(folder, tmp_path / "adapter", trained=False).eval()
    tokens = ids()
    expected = native(tokens)
    scale = float(expected.detach().abs().max())
    assert apart(twin(input_ids=tokens).logits, expected) < TOLERANCE * max(1.0, scale)
    assert apart(merge_adapter(native)(tokens), expected) < TOLERANCE * max(1.0, scale)
