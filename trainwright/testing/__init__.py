"""What tests are made of: the layer check, tiny models, golden numbers, ranks on one machine, executed snippets."""

from __future__ import annotations

from trainwright.testing.golden import compare_to_golden
from trainwright.testing.layers import broken_layers
from trainwright.testing.models import tiny_gpt2_config, tiny_llama_config, tiny_moe_config
from trainwright.testing.ranks import RankError, fork_server, run_ranks
from trainwright.testing.snippets import check_snippet, read_snippets

__all__ = [
    "RankError",
    "broken_layers",
    "check_snippet",
    "compare_to_golden",
    "fork_server",
    "read_snippets",
    "run_ranks",
    "tiny_gpt2_config",
    "tiny_llama_config",
    "tiny_moe_config",
]
