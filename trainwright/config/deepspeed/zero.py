"""`zero_optimization`, `aio`: what is sharded, what lives outside the device, and the knobs of how."""

from __future__ import annotations

from typing import Any

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    ANY,
    BOOL,
    COUNT,
    NUMBER,
    POSITIVE,
    TEXT,
    WHOLE,
    Block,
    Entry,
    Maps,
    NoEffect,
    NotBuilt,
)
from trainwright.config.fields import Words

__all__ = ["AIO", "ZERO", "convert"]

BLOCKS = "parameters travel block by block, as the model is built, and not in buckets of elements"
BUCKETS = "gradients travel block by block, as the model is built, and not in buckets of elements"
PLACES = Words(("none", "cpu", "nvme"))
FILES = "files of optimizer state are memory-mapped and prefetched: they need no buffers of their own"
PINNED = "whether host memory is page-locked follows from the device"
COLLECTIVE = "gradients always travel to the rank that owns them, and are summed there in fp32"

OFFLOAD_OPTIMIZER: dict[str, Entry] = {
    "device": Maps("memory.optimizer_state", PLACES, "none", "none: device; cpu: host; nvme: nvme"),
    "nvme_path": Maps("memory.nvme_path", TEXT),
    "pin_memory": NoEffect(PINNED, BOOL, True),
    "buffer_count": NoEffect(FILES, COUNT, 4),
    "fast_init": NoEffect("optimizer state is created where it will live", BOOL, False),
    "pipeline_read": NoEffect(FILES, BOOL, False),
    "pipeline_write": NoEffect(FILES, BOOL, False),
    "pipeline": NoEffect(FILES, BOOL, False),
    "ratio": NotBuilt("Twin-Flow (a part of the optimizer state offloaded)", NUMBER, (1.0,), "Offload all of it: 1.0."),
    "super_offload": NotBuilt("SuperOffload", BOOL, (False,), "The offloaded step overlaps without it."),
    "cpuadam_cores_perc": NoEffect("it belongs to super_offload", NUMBER, 0.8),
    "buffer_size": NoEffect(FILES, COUNT),
    "max_in_cpu": NoEffect(FILES, COUNT),
}

OFFLOAD_PARAM: dict[str, Entry] = {
    "device": Maps("memory.parameters", PLACES, "none", "none: device; cpu: host; nvme is refused; at stage 3 only"),
    "nvme_path": NoEffect("parameters go to host memory at most", TEXT),
    "pin_memory": NoEffect(PINNED, BOOL, True),
    "buffer_count": NoEffect("parameters go to host memory at most", COUNT, 5),
    "buffer_size": NoEffect("parameters go to host memory at most", COUNT, 1e8),
    "max_in_cpu": NoEffect("parameters go to host memory at most", COUNT, 1e9),
}

ZENFLOW = (
    *("topk_ratio", "select_strategy", "select_interval", "update_interval", "overlap_step", "offload"),
    *("auto_ratio", "full_warm_up_rounds", "pt_reserved_cores_perc", "steps_per_epoch"),
)

STAGE_3: dict[str, Entry] = {
    "prefetch_bucket_size": NoEffect(f"{BLOCKS}; parallel.prefetch counts blocks", COUNT, 5e7),
    "param_persistence_threshold": NoEffect("small parameters are sharded like all others of their block", COUNT, 1e5),
    "model_persistence_threshold": NoEffect("small parameters are sharded like all others of their block", COUNT),
    "max_live_parameters": NoEffect("a block is freed after its use; parallel.gather says when", COUNT, 1e9),
    "max_reuse_distance": NoEffect("a block is freed after its use; parallel.gather says when", COUNT, 1e9),
    "gather_16bit_weights_on_model_save": NoEffect("whole models can be exported at every stage", BOOL, False),
    "module_granularity_threshold": NoEffect(BLOCKS, COUNT, 0),
    "use_all_reduce_for_fetch_params": NoEffect("parameters are gathered with all-gather", BOOL, False),
    "allgather_sequential": NoEffect("a block is one all-gather", BOOL, False),
}

ZERO: dict[str, Entry] = {
    "stage": Maps("parallel.zero", Words((0, 1, 2, 3)), 0),
    "contiguous_gradients": NoEffect("gradients of a block lie in one buffer where they travel", BOOL, True),
    "reduce_scatter": NoEffect(COLLECTIVE, BOOL, True),
    "reduce_bucket_size": NoEffect(BUCKETS, COUNT, 5e8),
    "use_multi_rank_bucket_allreduce": NoEffect(COLLECTIVE, BOOL, True),
    "allgather_partitions": NoEffect("parameters are gathered with all-gather", BOOL, True),
    "allgather_bucket_size": NoEffect(BLOCKS, COUNT, 5e8),
    "overlap_comm": NoEffect("communication overlaps with computation at every stage", BOOL),
    "load_from_fp32_weights": NoEffect("checkpoints hold the fp32 weights, and these are loaded", BOOL, True),
    "elastic_checkpoint": NoEffect("every checkpoint loads on any number of ranks", BOOL, False),
    "offload_param": Block(OFFLOAD_PARAM),
    "offload_optimizer": Block(OFFLOAD_OPTIMIZER),
    "zenflow": Block(
        {key: NoEffect("", ANY) for key in ZENFLOW}, "", "ZenFlow", "offload_optimizer.device: cpu offloads without it."
    ),
    "sub_group_size": NoEffect("the optimizer's step is not cut into groups of elements", COUNT, 1e9),
    "cpu_offload": Maps("memory.optimizer_state", BOOL, False, "old form of offload_optimizer.device: cpu"),
    "cpu_offload_params": Maps("memory.parameters", BOOL, False, "old form of offload_param.device: cpu"),
    "cpu_offload_param": Maps("memory.parameters", BOOL, False, "old form of offload_param.device: cpu"),
    "cpu_offload_use_pin_memory": NoEffect(PINNED, BOOL),
    **{f"stage3_{key}": entry for key, entry in STAGE_3.items()},
    **STAGE_3,
    "stage3_gather_fp16_weights_on_model_save": STAGE_3["gather_16bit_weights_on_model_save"],
    "ignore_unused_parameters": NoEffect("parameters without gradient are allowed at every stage", BOOL, True),
    "legacy_stage1": NoEffect("there is one stage 1", BOOL, False),
    "round_robin_gradients": NoEffect("each rank owns a part of every parameter, so the work is even", BOOL, False),
    "parameter_alignment": NoEffect("FSDP2 lays out the shards", BOOL, False),
    "zero_hpz_partition_size": Maps("parallel.shard", POSITIVE, 1, "hybrid: shard in groups of ranks; 1 is all"),
    "mics_shard_size": Maps("parallel.shard", WHOLE, -1, "hybrid: shard in groups of ranks; -1 is all"),
    "mics_hierarchical_params_gather": NoEffect("the backend chooses the path of a gather", BOOL, False),
    "zero_quantized_weights": NotBuilt("gathering quantized weights (ZeRO++)", BOOL),
    "zero_quantized_nontrainable_weights": NotBuilt("gathering quantized frozen weights (ZeRO++)", BOOL),
    "zero_quantized_gradients": NotBuilt("sending quantized gradients (ZeRO++)", BOOL),
    "zeropp_loco_param": Block(
        {"err_beta": NoEffect("", ANY), "reset_T": NoEffect("", ANY)},
        "",
        "error feedback of quantized gradients",
    ),
    "memory_efficient_linear": NoEffect(
        "parallel.gather says whether gathered weights are kept for backward", BOOL, True
    ),
    "pipeline_loading_checkpoint": NoEffect("checkpoints are read in parallel by all ranks", BOOL, False),
    "override_module_apply": NoEffect("modules are not changed while they are built", BOOL, True),
    "log_trace_cache_warnings": NoEffect("no trace of module calls is recorded", BOOL, False),
    "enable_sanity_checks": NoEffect("they check DeepSpeed's own bookkeeping", BOOL, False),
    "leaf_module": Block(
        {
            "classes": NoEffect(BLOCKS, ANY),
            "names": NoEffect(BLOCKS, ANY),
            "name_suffixes": NoEffect(BLOCKS, ANY),
        }
    ),
    "save_muon_momentum_buffer_in_memory": NoEffect("memory.optimizer_state says where momentum lives", BOOL, False),
    "compute_grad_norm": NoEffect("the gradient norm is always taken", BOOL, True),
}

AIO: dict[str, Entry] = {
    "block_size": NoEffect(FILES, COUNT, 2**20),
    "queue_depth": NoEffect(FILES, COUNT, 8),
    "intra_op_parallelism": NoEffect(FILES, COUNT, 1),
    "thread_count": NoEffect(FILES, COUNT, 1),
    "single_submit": NoEffect(FILES, BOOL, False),
    "overlap_events": NoEffect(FILES, BOOL, True),
    "use_gds": NoEffect(FILES, BOOL, False),
}

_Z = "zero_optimization."


def convert(found: Import) -> None:
    """parallel.zero, parallel.shard, memory.optimizer_state, memory.nvme_path, memory.parameters."""
    stage = found.get(f"{_Z}stage")
    found.put(f"{_Z}stage", "parallel.zero", stage)
    _convert_groups(found, stage)
    _convert_optimizer_offload(found, stage)
    _convert_parameter_offload(found, stage)


def _convert_groups(found: Import, stage: int) -> None:
    sizes: dict[str, int] = {}
    for key, off in (("zero_hpz_partition_size", (1,)), ("mics_shard_size", (-1,))):
        size = found.get(_Z + key)
        if size in off:
            found.idle(_Z + key, f"{size} shards over all ranks")
        elif stage != 3:
            found.idle(_Z + key, f"DeepSpeed shards in groups at stage 3 only, and stage is {stage}")
        elif size < 1:
            found.refuse(_Z + key, f"seen {size}, expected a number of ranks, or {off[0]} for all.")
        elif found.state_ranks % size:
            ranks = f"the number of ranks, {found.world}"
            if found.state_ranks < found.world:
                ranks = f"the {found.state_ranks} ranks that hold the same part of the model"
            found.refuse(_Z + key, f"seen {size}, expected a divisor of {ranks}.")
        else:
            sizes[key] = size
            found.put(_Z + key, "parallel.shard", size)
    if len(set(sizes.values())) > 1:
        found.refuse(f"{_Z}mics_shard_size", "zero_hpz_partition_size says another size; expected one of them.")


def _convert_optimizer_offload(found: Import, stage: int) -> None:
    key, path, old = f"{_Z}offload_optimizer.device", f"{_Z}offload_optimizer.nvme_path", f"{_Z}cpu_offload"
    device: Any = found.get(key)
    if found.get(old) and device == "none" and found.has(key):
        found.refuse(old, "offload_optimizer says another place; expected one of them.")
    key = old if found.get(old) and device == "none" else key
    if key != old:
        found.idle(old, "false offloads nothing" if not found.get(old) else "offload_optimizer.device says the same")
    else:
        device = "cpu"
    if device == "none" or stage == 0:
        reason = "none offloads nothing" if device == "none" else "DeepSpeed offloads from stage 1 on, and stage is 0"
        found.idle(key, reason)
        found.idle(path, reason)
        return
    found.put(key, "memory.optimizer_state", "host" if device == "cpu" else "nvme")
    if device == "cpu":
        found.idle(path, "offload_optimizer.device is cpu")
    elif not found.has(path):
        found.refuse(path, "missing; expected a folder: offload_optimizer.device is nvme.")
    else:
        found.put(path, "memory.nvme_path", found.get(path))


def _convert_parameter_offload(found: Import, stage: int) -> None:
    key = f"{_Z}offload_param.device"
    olds = [f"{_Z}cpu_offload_param", f"{_Z}cpu_offload_params"]
    device = found.get(key)
    used = next((old for old in olds if found.get(old) and device == "none"), key)
    for old in olds:
        if old != used:
            found.idle(old, "offload_param.device says the same" if found.get(old) else "false offloads nothing")
    device = "cpu" if used != key else device
    if device == "none":
        found.idle(key, "none offloads nothing")
    elif stage != 3:
        found.idle(used, f"DeepSpeed offloads parameters at stage 3 only, and stage is {stage}")
    elif device == "nvme":
        found.refuse(used, "seen 'nvme': parameters on NVMe are not built yet. Use cpu.")
    else:
        found.put(used, "memory.parameters", "host")
    if used != key and found.has(key):
        found.refuse(used, "offload_param says another place; expected one of them.")
