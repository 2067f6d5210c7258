"""Over how many ranks a model, its sequences and its experts are divided: AutoTP, Ulysses, pipelines, AutoEP.

Keys of Megatron-LM's that people put beside DeepSpeed's (`ep_size`, `moe`) are read as well.
"""

from __future__ import annotations

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    ANY,
    BOOL,
    COUNT,
    NUMBER,
    POSITIVE,
    TEXT,
    Block,
    Entry,
    Maps,
    NoEffect,
    NotBuilt,
)

__all__ = ["PARALLEL", "convert"]

PLAN = "the family's plan, or the one that a Hugging Face model carries, says what is divided; the result is the same"
TYPES = "activations travel in the type that the precision computes in"
VOCABULARY = "embedding, head and loss are divided by vocabulary wherever matrices are"
GROUPS = "Trainwright makes the groups of ranks"
INFERENCE = "it is for inference"
WITH_PIPELINE = "it is for a pipeline, and pipeline.stages is 1 or open"
BALANCED = "blocks are balanced by cost; parallel.pipeline.cuts sets other cuts"
MESSAGES = "under tensor parallelism each rank sends its own part of a message between stages, in any case"
SEEDS = "the same seed gives the same weights in every layout"
EXCHANGE = "tokens travel by all-to-all and go through their experts in grouped products"
FAMILY = "the model's configuration says it"
MIXED_GROUPS = (
    "experts are told apart from other parameters by the model; their state and norms have groups of their own"
)

_TP: dict[str, Entry] = {
    "tp_size": Maps("parallel.tensor", COUNT, 0, "0 and 1 divide nothing"),
    "tp_grain_size": NoEffect("matrices are cut between heads, or evenly", COUNT, 1),
    "mpu": NoEffect(GROUPS, ANY),
    "tp_group": NoEffect(GROUPS, ANY),
}

TENSOR: dict[str, Entry] = {
    "autotp_size": Maps("parallel.tensor", COUNT, 0, "0 and 1 divide nothing"),
    "tp": Block(_TP),
    "tensor_parallel": Block(_TP),
    "tp_overlap_comm": Maps("parallel.async_tensor", BOOL, False),
    "enabled": NoEffect("autotp_size says over how many ranks", ANY),
    "dtype": NoEffect(TYPES, ANY),
    **dict.fromkeys(("vocab_parallel_lm_head", "vocab_parallel_ce_backend"), NoEffect(VOCABULARY, ANY)),
    **dict.fromkeys(("injection_policy_tuple", "partition_config", "preset_model"), NoEffect(PLAN, ANY)),
    **dict.fromkeys(("keep_module_on_host", "replace_with_kernel_inject", "kernel_inject"), NoEffect(INFERENCE, ANY)),
}

PIPELINE: dict[str, Entry] = {
    "stages": Maps("parallel.pipeline.stages", POSITIVE, 1),
    "partition": NoEffect(BALANCED, TEXT, "best"),
    "partition_method": NoEffect(BALANCED, TEXT),
    "seed_layers": NoEffect(SEEDS, BOOL, False),
    "activation_checkpoint_interval": Maps("memory.recompute", COUNT, 0, "0: as memory.recompute is; else full"),
    "pipe_partitioned": NoEffect(MESSAGES, BOOL, True),
    "grad_partitioned": NoEffect(MESSAGES, BOOL, True),
    "use_reentrant": NoEffect("both ways of recomputing give the same gradients", BOOL, True),
}

EXPERTS: dict[str, Entry] = {
    "enabled": Maps("parallel.expert", BOOL, False, "false divides no experts"),
    "autoep_size": Maps("parallel.expert", POSITIVE, 1),
    "expert_tensor_parallel_size": NoEffect("each expert is divided by parallel.tensor", ANY),
    "load_balance_coeff": NotBuilt(
        "a weight of the balancing loss beside the model's own",
        NUMBER,
        (None,),
        "Set model.overrides.auxiliary_weight.",
    ),
    **{
        key: NoEffect(FAMILY, ANY)
        for key in (
            *("preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "route_norm", "route_scale"),
            *("score_apply", "num_expert_groups", "num_limited_groups", "score_func", "top_k"),
            *("routed_scaling_factor", "expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr"),
            *("has_shared_experts", "shared_experts_pattern", "shared_experts_gate_pattern", "expert_activation"),
        )
    },
    **{
        key: NoEffect(EXCHANGE, ANY)
        for key in (
            *("validate_folding_routing", "async_split_plan", "use_grouped_mm", "disable_triton_grouped_mm"),
            *("combine_impl", "row_weighting_impl", "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin"),
            "comm_max_tokens_per_rank",
        )
    },
}

MOE: dict[str, Entry] = {
    "enabled": NoEffect("ep_size says over how many ranks", ANY),
    "ep_size": Maps("parallel.expert", POSITIVE, 1),
    **{key: NoEffect(FAMILY, ANY) for key in ("moe_experts", "num_experts", "type")},
    **{key: NoEffect(GROUPS, ANY) for key in ("ep_mp_group", "ep_group")},
    "moe_param_group": NoEffect(MIXED_GROUPS, ANY),
}

PARALLEL: dict[str, Entry] = {
    "tensor_parallel": Block(TENSOR),
    "pipeline": Block(PIPELINE),
    "sequence_parallel_size": Maps("parallel.context", POSITIVE, 1, "and parallel.ulysses: heads are exchanged"),
    "expert_parallel": Block(EXPERTS),
    "moe": Block(MOE),
    "ep_size": Maps("parallel.expert", POSITIVE, 1),
    "expert_parallel_size": Maps("parallel.expert", POSITIVE, 1),
    "use_data_before_expert_parallelism": NoEffect("the order of ranks changes no result", BOOL, False),
    "data_parallel_size": Maps("parallel", POSITIVE, None, "checked: it must be the ranks left by the other sizes"),
}

TENSOR_KEYS = tuple(f"tensor_parallel.{key}" for key in ("autotp_size", "tp.tp_size", "tensor_parallel.tp_size"))
EXPERT_KEYS = ("expert_parallel.autoep_size", "moe.ep_size", "ep_size", "expert_parallel_size")
SEQUENCE, STAGES = "sequence_parallel_size", "pipeline.stages"


def convert(found: Import) -> None:
    """parallel.tensor, parallel.async_tensor, parallel.context, parallel.ulysses, parallel.expert, parallel.pipeline,
    memory.recompute; whether they divide the ranks."""
    tensor = _degree(found, TENSOR_KEYS, "parallel.tensor")
    overlap = "tensor_parallel.tp_overlap_comm"
    if tensor == 1:
        found.idle(overlap, "no matrix is divided")
    elif found.has(overlap):
        found.put(overlap, "parallel.async_tensor", found.get(overlap))
    context = _degree(found, (SEQUENCE,), "parallel.context")
    if context > 1:
        found.result["parallel"]["ulysses"] = context
    _convert_experts(found)
    stages = _convert_pipeline(found)
    _check_ranks(found, tensor, context, stages)


def _degree(found: Import, keys: tuple[str, ...], target: str) -> int:
    """One degree that several keys can say; the first that divides something counts, and others must agree."""
    given = {key: found.get(key) for key in keys if found.has(key) and found.get(key) > 1}
    for key in keys:
        if key not in given:
            found.idle(key, f"{found.get(key)} divides nothing")
    first = next(iter(given), None)
    if first is None:
        return 1
    for key, size in given.items():
        if size == given[first]:
            found.put(key, target, size)
        else:
            found.refuse(key, f"{first} says {given[first]}; expected one size for both.")
    return int(given[first])


def _convert_experts(found: Import) -> None:
    switch, size = "expert_parallel.enabled", "expert_parallel.autoep_size"
    on = found.get(switch)
    if not on and found.has(size):
        found.idle(size, "expert_parallel.enabled is false")
    keys = EXPERT_KEYS if on else EXPERT_KEYS[1:]
    _degree(found, keys, "parallel.expert")
    found.idle(switch, "expert_parallel.autoep_size says over how many ranks" if on else "false divides no experts")


def _convert_pipeline(found: Import) -> int:
    stages = found.get(STAGES)
    interval = "pipeline.activation_checkpoint_interval"
    if stages == 1:
        found.idle(STAGES, "1 cuts nothing")
        found.idle(interval, WITH_PIPELINE)
        return 1
    found.put(STAGES, "parallel.pipeline.stages", stages)
    if found.get(interval):
        found.put(interval, "memory.recompute", "full")
    else:
        found.idle(interval, "0 recomputes nothing by itself")
    return int(stages)


def _check_ranks(found: Import, tensor: int, context: int, stages: int) -> None:
    same = tensor * context * stages
    keys = [key for key in (*TENSOR_KEYS, SEQUENCE, STAGES) if found.has(key) and found.get(key) > 1]
    if found.world % same and keys:
        sizes = f"tensor {tensor} x sequence {context} x stages {stages}"
        found.refuse(keys[0], f"{sizes} does not divide the number of ranks, {found.world}.")
        return
    ranks, left = found.get("data_parallel_size"), found.world // same
    if ranks is not None and ranks != left:
        rest = "the number of ranks" if same == 1 else f"the {found.world} ranks / {same} to the same rows"
        found.refuse("data_parallel_size", f"seen {ranks}, expected {rest}, {left}, or nothing.")
    found.idle("data_parallel_size", "it follows from the number of ranks")
    found.state_ranks, found.row_ranks = found.world // (tensor * stages), left
