"""Mixtral, Qwen 2/3 MoE and the DeepSeek style: a llama whose layers hold experts."""

from __future__ import annotations

from trainwright.models.moe.config import MoEConfig
from trainwright.models.moe.model import MoEForCausalLM

__all__ = ["MoEConfig", "MoEForCausalLM"]
