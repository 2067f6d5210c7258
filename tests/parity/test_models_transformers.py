"""Every supported architecture gives the logits of transformers, from its folder and back to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.models import load_pretrained, save_pretrained
from trainwright.models.registry import family_of

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2_TINY: dict[str, Any] = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
GPT2_TINY |= {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama-mha-tied": ("LlamaForCausalLM", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 3]}),
    "llama-linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-dynamic": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 24,
        },
    ),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN_ROPE}),
    "llama-yarn-options": (
        "LlamaForCausalLM",
        {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-layer-types": (
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-scaled": ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 64}),
    "gpt2-unscaled-relu": ("GPT2LMHeadModel", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt2-untied-gelu": ("GPT2LMHeadModel", {"tie_word_embeddings": False, "activation_function": "gelu"}),
}


def make_reference(variant: str) -> Any:
    """A transformers model with random weights everywhere, biases and norms included."""
    class_name, changes = VARIANTS[variant]
    model_class = getattr(transformers, class_name)
    base = GPT2_TINY if class_name == "GPT2LMHeadModel" else TINY
    config = model_class.config_class(**{**base, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_from_transformers_gives_its_logits(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), reference(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_by_us_opens_in_transformers(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    reopened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(reopened) is type(reference)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(reopened.eval()(tokens()).logits, model(tokens()), rtol=1e-5, atol=1e-5)
    assert load_pretrained(tmp_path / "ours").config == model.config
    ours, theirs = reopened.config.to_dict(), reference.config.to_dict()
    skipped = {"_name_or_path", "dtype", "torch_dtype", "architectures", "n_ctx", "n_inner", "max_window_layers"}
    rope = ours.pop("rope_parameters", {}), theirs.pop("rope_parameters", {})
    assert rope[0].items() >= rope[1].items()
    for key in theirs.keys() - skipped - {"attn_implementation", "_attn_implementation"}:
        assert ours[key] == theirs[key], key


def test_config_of_older_transformers_is_read(tmp_path: Path) -> None:
    """Before release 5 the file had rope_theta and rope_scaling (with `type` or `rope_type`) and torch_dtype."""
    reference = make_reference("llama3")
    reference.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    values["torch_dtype"] = values.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with torch.no_grad():
        ours = load_pretrained(tmp_path)(tokens())
        torch.testing.assert_close(ours, reference(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama2", "llama-mha-tied", "gpt2", "qwen3"])
def test_sharded_folders_both_ways(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = reference(tokens()).logits
        torch.testing.assert_close(reopened(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(tokens()), expected, rtol=1e-5, atol=1e-5)


def test_bare_trunk_checkpoint_loads(tmp_path: Path) -> None:
    """The hub's own `gpt2` was saved from the trunk: no `transformer.` prefix, and with mask buffers inside."""
    from safetensors.torch import save_file

    reference = make_reference("gpt2")
    reference.save_pretrained(tmp_path)
    state = {name: value.contiguous() for name, value in reference.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    with torch.no_grad():
        ours = load_pretrained(tmp_path)(tokens())
        torch.testing.assert_close(ours, reference(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_bias_free_gpt2_opens_with_zero_biases(tmp_path: Path) -> None:
    from trainwright.models import build_model, preset

    model = build_model(preset("gpt2-nano", initializer_range=0.1), seed=3).eval()
    save_pretrained(model, tmp_path)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    x = torch.randint(0, 65, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(reopened(x).logits, model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["llama3", "qwen2-sliding", "mistral", "gpt2"])
def test_gradients_equal(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    x = tokens()
    for logits in (model(x), reference(x).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = family_of(model.config).weights.from_file(model.config, name, theirs[name].grad)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
