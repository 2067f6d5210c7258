"""Norms, activations and the runtime settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.ops.activation import activation, gelu_new, swiglu, swiglu_reference
from trainwright.ops.cpu_runtime import tune_cpu_runtime
from trainwright.ops.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference


def test_rms_norm_equals_its_definition_and_transformers() -> None:
    x, weight = torch.randn(3, 5, 64) * 7, torch.rand(64) + 0.5
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6), rtol=2e-6, atol=1e-6)
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64, 1e-6)
    theirs.weight.data = weight.bfloat16()
    assert torch.equal(rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6), theirs(x.bfloat16()))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_its_definition(bias: bool) -> None:
    x, weight, shift = torch.randn(4, 32) * 3 + 2, torch.rand(32), torch.randn(32) if bias else None
    torch.testing.assert_close(
        layer_norm(x, weight, shift), layer_norm_reference(x, weight, shift), rtol=2e-6, atol=2e-6
    )
    assert layer_norm(x.bfloat16(), weight, shift).dtype == torch.bfloat16


@pytest.mark.parametrize("function", [rms_norm, lambda x, w: layer_norm(x, w)])
def test_norm_gradients_by_finite_differences(function: Any) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weight))


def test_swiglu_equals_its_definition() -> None:
    gate, up = torch.randn(100) * 5, torch.randn(100)
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up), rtol=2e-6, atol=1e-6)
    narrow = swiglu(gate.bfloat16(), up.bfloat16())
    torch.testing.assert_close(narrow, swiglu_reference(gate.bfloat16(), up.bfloat16()), rtol=8e-3, atol=0)


def test_activations_by_their_hugging_face_names() -> None:
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 200)
    for name in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"):
        torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)
    assert activation("gelu_new") is gelu_new
    with pytest.raises(ModelError, match="unknown activation 'gelo'"):
        activation("gelo")


def test_tuning_the_runtime_says_what_it_did() -> None:
    settings = tune_cpu_runtime()
    assert settings
    assert settings == tune_cpu_runtime()
    assert all(setting.name and setting.value and setting.reason for setting in settings)
