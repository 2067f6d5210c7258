"""Parts of models by the names of their parameters: layer-wise learning rates and freezing, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.config import load_recipe
from trainwright.engine import optimizer_options
from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.optim import OptimizerOptions, Rule, build_optimizer
from trainwright.optim.parts import ModelParts

LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4
)
GPT2 = GPT2Config(vocab_size=32, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16)


def rates(model: nn.Module, elsewhere: list[str] | None = None, **options: Any) -> dict[str, float]:
    named = model.named_parameters(remove_duplicate=False)
    optimizer = build_optimizer(named, OptimizerOptions(lr=1.0, **options), elsewhere=elsewhere or [])
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def hugging_face(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        small = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 2}
        t5 = {"vocab_size": 32, "d_model": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2, "d_kv": 4}
        bart = {
            "vocab_size": 32,
            "d_model": 8,
            "encoder_layers": 3,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        }
        made = {
            "bert": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**small, **heads)),
            "roberta": lambda: transformers.RobertaForSequenceClassification(
                transformers.RobertaConfig(**small, **heads)
            ),
            "deberta": lambda: transformers.DebertaV2ForSequenceClassification(
                transformers.DebertaV2Config(**small, **heads, relative_attention=True)
            ),
            "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small, **heads)),
            "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
            "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**bart)),
        }
        model: nn.Module = made[name]()
        return model

    return make


NEOX_HEAD = "lm_head.weight"
EXPECTED = {
    "llama": {
        "model.embed_tokens.weight": 4,
        "model.layers.0.self_attn.q_proj.weight": 3,
        "model.layers.2.input_layernorm.weight": 1,
        "model.norm.weight": 0,
        "lm_head.weight": 0,
    },
    "gpt2": {"transformer.wte.weight": 4, "transformer.wpe.weight": 4, "transformer.h.1.ln_1.bias": 2},
    "bert": {
        "bert.embeddings.word_embeddings.weight": 4,
        "bert.embeddings.LayerNorm.weight": 4,
        "bert.encoder.layer.0.attention.self.query.weight": 3,
        "bert.encoder.layer.2.output.LayerNorm.bias": 1,
        "classifier.weight": 0,
    },
    "roberta": {"roberta.embeddings.position_embeddings.weight": 4, "classifier.dense.weight": 0},
    "deberta": {"deberta.encoder.rel_embeddings.weight": 4, "deberta.encoder.layer.1.output.dense.weight": 2},
    "neox": {"gpt_neox.embed_in.weight": 4, "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": 1, NEOX_HEAD: 0},
    "t5": {
        "shared.weight": 4,
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": 3,
        "decoder.block.2.layer.0.SelfAttention.q.weight": 1,
        "decoder.final_layer_norm.weight": 0,
    },
    "bart": {
        "model.shared.weight": 4,
        "model.encoder.layernorm_embedding.weight": 4,
        "model.encoder.layers.0.fc1.weight": 3,
        "model.decoder.layers.0.fc1.weight": 2,
    },
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: build_model(LLAMA),
    "gpt2": lambda: build_model(GPT2),
    **{name: hugging_face(name) for name in EXPECTED if name not in ("llama", "gpt2")},
}


@pytest.mark.parametrize("family", list(EXPECTED))
def test_rates_fall_from_the_head_to_the_embeddings(family: str) -> None:
    model = MODELS[family]()
    found = rates(model, layer_decay=0.5)
    for name, depth in EXPECTED[family].items():
        assert found[name] == 0.5**depth, name
    assert max(found.values()) == (0.5 if family == "bart" else 1.0), "BART has nothing above its last layers"
    assert len(found) == len(list(model.parameters()))


@pytest.mark.parametrize("family", list(EXPECTED))
def test_norms_biases_and_embeddings_do_not_decay(family: str) -> None:
    model = MODELS[family]()
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(weight_decay=0.3))
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(word in name for word in ("embed", "wte", "wpe", "shared", "relative_att"))
        assert decay[name] == (0.0 if exempt and name != NEOX_HEAD else 0.3), name


def test_a_rule_multiplies_what_the_layer_leaves_and_the_highest_rate_is_reported() -> None:
    model = build_model(LLAMA)
    found = rates(model, layer_decay=0.5, rules=(Rule(part="head", lr_scale=10.0), Rule("q_proj", lr_scale=0.1)))
    assert found["lm_head.weight"] == 10.0
    assert found["model.layers.2.self_attn.q_proj.weight"] == pytest.approx(0.05)
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(lr=1.0, layer_decay=0.5))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_stage_that_holds_some_layers_has_the_rates_of_the_whole_model() -> None:
    whole = build_model(LLAMA)
    expected = rates(whole, layer_decay=0.5)
    held = nn.Module()
    held.model = nn.Module()
    held.model.layers = nn.ModuleDict({"1": nn.Linear(2, 2)})
    names = [name for name, _ in whole.named_parameters()]
    assert rates(held, names, layer_decay=0.5) == {
        "model.layers.1.weight": expected["model.layers.1.mlp.up_proj.weight"],
        "model.layers.1.bias": expected["model.layers.1.mlp.up_proj.weight"],
    }


def test_layer_decay_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers that are numbered"):
        rates(nn.Linear(2, 2), layer_decay=0.9)


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("embeddings", lambda name: "embed_tokens" not in name),
        ("head", lambda name: not name.startswith("lm_head")),
        ("layers.0-1", lambda name: "layers.0." not in name and "layers.1." not in name),
        ("layers.2", lambda name: "layers.2." not in name),
        ("layers", lambda name: "layers." not in name),
        ("all_but_head", lambda name: name.startswith("lm_head")),
    ],
)
def test_parts_are_frozen(part: str, trained: Callable[[str], bool]) -> None:
    model = build_model(LLAMA)
    found = rates(model, freeze=(part,))
    assert set(found) == {name for name, _ in model.named_parameters() if trained(name)}
    assert all(parameter.requires_grad == trained(name) for name, parameter in model.named_parameters())


def test_all_but_the_head_of_a_transformers_classifier() -> None:
    found = rates(MODELS["roberta"](), freeze=("all_but_head",))
    layers = ("classifier.dense", "classifier.out_proj")
    assert set(found) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("part", "words"),
    [("layers.2-5", "layers 0 to 2"), ("layers.2-1", "layers 0 to 2"), ("elephant", "names no part")],
)
def test_a_part_that_is_not_there_is_refused(part: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rates(build_model(LLAMA), freeze=(part,))


def test_a_model_whose_head_is_its_embedding_has_no_head_to_freeze() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.weight", "model.norm.weight"]
    with pytest.raises(ConfigError, match="no part 'head'"):
        ModelParts(names).check("head")


def test_a_rule_has_a_pattern_or_a_part() -> None:
    with pytest.raises(ConfigError, match="either a pattern or a part"):
        Rule(lr_scale=0.5)


def test_a_recipe_says_it() -> None:
    recipe = load_recipe(
        {
            "model": {"preset": "llama-15m"},
            "data": {"source": "python-stdlib"},
            "optim": {"lr": 1.0, "layer_decay": 0.5, "rules": [{"part": "head", "lr_scale": 4.0}]},
            "train": {"freeze": ["embeddings", "layers.0-1"]},
        }
    ).recipe
    options = optimizer_options(recipe.optim, recipe.precision, freeze=recipe.train.freeze)
    assert options.weight_decay == 0.1, "auto, where nobody settled it"
    optimizer = build_optimizer(build_model(LLAMA).named_parameters(), options)
    found = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert found["lm_head.weight"] == 4.0
    assert found["model.layers.2.mlp.up_proj.weight"] == 0.5
    assert not any("layers.0" in name or "layers.1" in name or "embed" in name for name in found)


def test_layers_train_at_their_own_rates() -> None:
    """One step of SGD from equal gradients: weights move in the ratio of the rates."""
    model = build_model(LLAMA)
    optimizer = build_optimizer(
        model.named_parameters(), OptimizerOptions(name="sgd", momentum=0.0, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
    assert moved["lm_head.weight"] == pytest.approx(1.0, rel=1e-5)
    assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.125, rel=1e-5)
