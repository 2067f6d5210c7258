"""Using a trained model: generation, streaming and chat."""

from __future__ import annotations

from trainwright.inference.chat import ChatSession
from trainwright.inference.generate import Generator
from trainwright.inference.loading import load_generator
from trainwright.inference.options import Generation, GenerationOptions

__all__ = ["ChatSession", "Generation", "GenerationOptions", "Generator", "load_generator"]
