"""GPT-2 and nanoGPT's variant of it."""

from __future__ import annotations

from trainwright.models.gpt2.config import GPT2Config
from trainwright.models.gpt2.model import GPT2LMHeadModel

__all__ = ["GPT2Config", "GPT2LMHeadModel"]
