"""Context parallelism: rows too long for one rank are divided over several. Ring attention, Ulysses, and both."""

from trainwright.parallel.context.apply import ContextAttention, apply_context
from trainwright.parallel.context.batch import cut_batch, gather_sequence
from trainwright.parallel.context.exchange import ContextGroup
from trainwright.parallel.context.order import SequenceOrder
from trainwright.parallel.context.problems import choose_ulysses, context_problems

__all__ = [
    "ContextAttention",
    "ContextGroup",
    "SequenceOrder",
    "apply_context",
    "choose_ulysses",
    "context_problems",
    "cut_batch",
    "gather_sequence",
]
