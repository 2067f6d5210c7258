"""Pipeline parallelism: consecutive parts of a model on consecutive ranks, over torch.distributed.pipelining."""

from trainwright.parallel.pipeline.balance import balanced_cuts, parts_of_rank, rank_of_part
from trainwright.parallel.pipeline.orders import order_of_work
from trainwright.parallel.pipeline.parts import Part, Split
from trainwright.parallel.pipeline.predict import bubble_share, predicted_actions
from trainwright.parallel.pipeline.rules import pipeline_problems
from trainwright.parallel.pipeline.runner import PipelineRunner, divides_backward
from trainwright.parallel.pipeline.split import (
    alias_parameters,
    is_split,
    module_names,
    parameter_names,
    split_model,
    split_of,
)
from trainwright.parallel.pipeline.tied import sum_tied_gradients
from trainwright.parallel.pipeline.trace import Action, chrome_trace, idle_share, write_chrome_trace

__all__ = [
    "Action",
    "Part",
    "PipelineRunner",
    "Split",
    "alias_parameters",
    "balanced_cuts",
    "bubble_share",
    "chrome_trace",
    "divides_backward",
    "idle_share",
    "is_split",
    "module_names",
    "order_of_work",
    "parameter_names",
    "parts_of_rank",
    "pipeline_problems",
    "predicted_actions",
    "rank_of_part",
    "split_model",
    "split_of",
    "sum_tied_gradients",
    "write_chrome_trace",
]
