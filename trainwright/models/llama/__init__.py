"""Llama 2/3, Mistral, Qwen 2/3: one decoder with a few switches."""

from __future__ import annotations

from trainwright.models.llama.config import LlamaConfig
from trainwright.models.llama.model import LlamaForCausalLM

__all__ = ["LlamaConfig", "LlamaForCausalLM"]
