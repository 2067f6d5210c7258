"""Every mixture-of-experts architecture gives the logits of transformers, from its folder and back to it, bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.models import load_pretrained, save_pretrained

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
QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
QWEN2: dict[str, Any] = {**QWEN, "shared_expert_intermediate_size": 64}
DOTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "router_aux_loss_coef": 0.02}),
    "mixtral-sliding-tied": ("MixtralForCausalLM", {"sliding_window": 8, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", QWEN2),
    "qwen2-moe-sparse-normed": (
        "Qwen2MoeForCausalLM",
        {**QWEN2, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen2-moe-sliding": (
        "Qwen2MoeForCausalLM",
        {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-dense-layers": ("Qwen3MoeForCausalLM", {**QWEN, "head_dim": 8, "mlp_only_layers": [0, 2]}),
    "qwen3-moe-sliding": (
        "Qwen3MoeForCausalLM",
        {**QWEN, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "attention_bias": True},
    ),
    "dots1": ("Dots1ForCausalLM", DOTS),
    "dots1-groups": ("Dots1ForCausalLM", {**DOTS, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    "dots1-sliding": ("Dots1ForCausalLM", {**DOTS, "sliding_window": 8, "max_window_layers": 1}),
}


def make_reference(variant: str) -> Any:
    """A transformers model with random weights everywhere, norms and the bias of the choice included."""
    class_name, changes = VARIANTS[variant]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**TINY, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_both_ways(variant: str, tmp_path: Path) -> None:
    """Their folder gives their logits here; ours, made of it, has the same tensors bit by bit and opens there."""
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(tokens()).logits
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
    save_pretrained(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)

    reopened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(reopened) is type(reference)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(reopened.eval()(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    again = load_pretrained(tmp_path / "ours")
    assert again.config == model.config
    own = again.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    kept, given = reopened.config.to_dict(), reference.config.to_dict()
    # Written in other words with the same meaning: which layers are dense, and where no window is.
    skipped = {"_name_or_path", "dtype", "head_dim", "max_window_layers", "rope_parameters", "transformers_version"}
    skipped |= {"mlp_only_layers", "decoder_sparse_step", "_attn_implementation", "attn_implementation"}
    for key in given.keys() - skipped:
        assert (kept[key] or None) == (given[key] or None), key


def test_half_precision_folder_keeps_the_bias_in_fp32(tmp_path: Path) -> None:
    reference = make_reference("dots1")
    reference.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    bias = model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, reference.model.layers[1].mlp.gate.e_score_correction_bias)
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again = load_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe", "qwen3-moe", "dots1-groups"])
def test_gradients_equal(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    x = tokens()
    for logits in (model(x), reference(x).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name in list(theirs):
        if name.endswith("gate_up_proj"):
            gate, up = theirs.pop(name).chunk(2, dim=1)
            theirs[name.replace("gate_up", "gate")], theirs[name.replace("gate_up", "up")] = gate, up
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = theirs[name.replace("shared_expert.", "shared_experts.") if "dots" in variant else name]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["mixtral-sliding-tied", "qwen2-moe", "dots1-groups"])
def test_generation_with_a_cache_gives_the_tokens_of_transformers(variant: str, tmp_path: Path) -> None:
    reference = make_reference(variant)
    reference.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    prompt = tokens(rows=1, length=11)
    expected = reference.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = model.make_cache(1, 31)
    with torch.no_grad():
        seen = prompt
        logits = model(prompt, cache=cache)
        for _ in range(20):
            seen = torch.cat((seen, logits[:, -1:].argmax(-1)), dim=1)
            logits = model(seen[:, -1:], cache=cache)
    assert seen.tolist() == expected.tolist()
