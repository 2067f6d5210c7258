"""Ways to divide a model over processes, each an `apply_*` over a pure module."""

from trainwright.parallel.blocks import blocks_of, find_blocks
from trainwright.parallel.buckets import complete_sums
from trainwright.parallel.data_parallel import DataParallel
from trainwright.parallel.zero import ZeroOptions, apply_zero

__all__ = ["DataParallel", "ZeroOptions", "apply_zero", "blocks_of", "complete_sums", "find_blocks"]
