"""Tasks: how an example becomes a batch, a head, a loss and metrics."""

from trainwright.tasks.causal_lm import CausalLM
from trainwright.tasks.task import LossOutput, Task

__all__ = ["CausalLM", "LossOutput", "Task"]
