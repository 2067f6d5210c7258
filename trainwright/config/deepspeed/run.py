"""The batch sizes, activation checkpointing, checkpoints, and what DeepSpeed prints, times and logs."""

from __future__ import annotations

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    ANY,
    BOOL,
    COUNT,
    POSITIVE,
    TEXT,
    WHOLE,
    Block,
    Entry,
    Maps,
    NoEffect,
    NotBuilt,
    off_block,
)
from trainwright.config.fields import Real, Words

__all__ = ["BATCH_KEYS", "RUN", "convert"]

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

QUIET = "the engine prints and logs nothing by itself; trainwright.monitor does"
PROFILER = "there is no profiler in the engine; torch.profiler sees all of its work"
BY_MODEL = "it is for calls of deepspeed.checkpointing in the model's own code"
COMMIT = "each rank writes its own part, and one commit makes the checkpoint valid"
WRITER = "checkpoints are written by Trainwright's own writer"
COMPILE = "Compile the blocks with compile_blocks(model)."


def _logger(*keys: str) -> Block:
    return Block({"enabled": NoEffect(QUIET, BOOL, False), **{key: NoEffect(QUIET, ANY) for key in keys}})


def _profiler(**keys: object) -> Block:
    return Block({key: NoEffect(PROFILER, ANY, default) for key, default in keys.items()})


RUN: dict[str, Entry] = {
    "train_batch_size": Maps("batch.global", POSITIVE),
    "train_micro_batch_size_per_gpu": Maps("batch.micro", POSITIVE),
    "gradient_accumulation_steps": Maps("batch.accumulation", POSITIVE),
    "managed_gradient_accumulation": NotBuilt(
        "accumulation whose boundary the caller keeps",
        BOOL,
        (True,),
        "engine.set_gradient_accumulation_boundary() says where the boundary is.",
    ),
    "gradient_clipping": Maps("optim.clip_norm", Real(minimum=0), 1.0, "0: null, which does not clip"),
    "zero_allow_untested_optimizer": NoEffect("no list of tested optimizers is kept", BOOL, False),
    "zero_force_ds_cpu_optimizer": NoEffect("one implementation of an optimizer serves device and host", BOOL, True),
    "disable_allgather": NoEffect("parameters are gathered with all-gather", BOOL, False),
    "disable_python_gc": NoEffect("Python's garbage collector is left alone", BOOL, False),
    "dataloader_drop_last": NoEffect("rows that do not fill a micro-batch on every rank are left out", BOOL, False),
    "vocabulary_size": NoEffect("DeepSpeed only warns by it", COUNT),
    "activation_checkpointing": Block(
        {
            "partition_activations": NoEffect(
                "each tensor rank keeps its own part of the activations between blocks, in any case", BOOL
            ),
            "cpu_checkpointing": Maps("memory.offload_activations", BOOL, False),
            "contiguous_memory_optimization": NoEffect(BY_MODEL, BOOL, False),
            "number_checkpoints": NoEffect(BY_MODEL, COUNT),
            "synchronize_checkpoint_boundary": NoEffect(BY_MODEL, BOOL, False),
            "profile": NoEffect(BY_MODEL, BOOL, False),
        }
    ),
    "checkpoint": Block(
        {
            "tag_validation": NoEffect(
                "ranks agree on the name of a checkpoint in any case",
                Words(("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail")),
                "Warn",
            ),
            "load_universal": NoEffect("every checkpoint loads into every layout", BOOL, False),
            "use_node_local_storage": NotBuilt("checkpoints on each machine's own disk", BOOL),
            "parallel_write": Block({"pipeline_stage": NoEffect(COMMIT, BOOL, False)}),
            "checkpoint_serialization": NoEffect("checkpoints are safetensors files, never pickles", BOOL, True),
            "writer": Block(
                {
                    "type": NoEffect(WRITER, TEXT, "FAST"),
                    "decoupled": NoEffect(WRITER, BOOL, False),
                    "io_buffer_size": NoEffect(WRITER, COUNT, 2**26),
                    "io_buffer_double": NoEffect(WRITER, BOOL, True),
                    "io_multiplier": NoEffect(WRITER, COUNT, 1),
                    "show_statistics": NoEffect(WRITER, BOOL, False),
                    "data_parallel": NoEffect(COMMIT, TEXT),
                }
            ),
        }
    ),
    "datastates_ckpt": NoEffect(WRITER, ANY, False),
    "steps_per_print": NoEffect(QUIET, WHOLE),
    "wall_clock_breakdown": NoEffect(QUIET, BOOL, False),
    "memory_breakdown": NoEffect(QUIET, BOOL, False),
    "dump_state": NoEffect(QUIET, BOOL, False),
    "log_level": NoEffect(QUIET, TEXT),
    "tensorboard": _logger("output_path", "job_name"),
    "wandb": _logger("group", "team", "project"),
    "csv_monitor": _logger("output_path", "job_name"),
    "comet": _logger(
        *("samples_log_interval", "project", "workspace", "api_key", "experiment_name", "experiment_key"),
        *("online", "mode"),
    ),
    "comms_logger": _logger("prof_all", "prof_ops", "verbose", "debug"),
    "flops_profiler": _profiler(
        enabled=False,
        recompute_fwd_factor=0.0,
        profile_step=1,
        module_depth=-1,
        top_modules=1,
        detailed=True,
        output_file=None,
    ),
    "timers": Block(
        {"throughput": Block({"enabled": NoEffect(QUIET, BOOL, True), "synchronized": NoEffect(QUIET, BOOL)})}
    ),
    "autotuning": off_block(
        "DeepSpeed's autotuner",
        *("fast", "results_dir", "exps_dir", "overwrite", "start_profile_step", "end_profile_step", "metric"),
        *("metric_path", "tuner_type", "tuner_early_stopping", "tuner_num_trials", "arg_mappings", "mp_size"),
        *("max_train_batch_size", "min_train_batch_size", "max_train_micro_batch_size_per_gpu"),
        *("min_train_micro_batch_size_per_gpu", "num_tuning_micro_batch_sizes", "model_info_path", "model_info"),
        *("zero_optimization", "train_micro_batch_size_per_gpu", "micro_batch_sizes", "early_stopping", "num_trials"),
        instead="Leave values open instead: auto is decided by the machine and the model.",
    ),
    "compile": Block(
        {
            "deepcompile": NotBuilt("DeepCompile", BOOL, (False,), COMPILE),
            **{
                key: NoEffect("it belongs to deepcompile", ANY)
                for key in (
                    *("autoep_non_moe", "free_activation", "free_activation_threshold", "offload_activation"),
                    *("offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory"),
                    *("debug_log", "offload_parameters", "sync_before_reduce", "sync_after_reduce"),
                    *("sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors"),
                    *("keep_all_input_tensors", "passes"),
                )
            },
            "enabled": NotBuilt(
                "compiling by a key of the configuration",
                BOOL,
                (False,),
                COMPILE,
            ),
            "backend": NoEffect("it belongs to compile.enabled", TEXT, "inductor"),
            "kwargs": NoEffect("it belongs to compile.enabled", ANY),
        }
    ),
    "hybrid_engine": off_block(
        "the hybrid engine (generation inside the training engine)",
        *("max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters"),
        *("tp_gather_partition_size", "enable_cuda_graph"),
    ),
    "nebula": off_block(
        "Nebula",
        *("persistent_storage_path", "persistent_time_interval", "num_of_version_in_retention"),
        *("enable_nebula_load", "load_path"),
        instead="Checkpoints are written in the background without it.",
    ),
    "graph_harvesting": NotBuilt("graph harvesting (CUDA graphs)", BOOL),
    "progressive_layer_drop": off_block("progressive layer dropping", "theta", "gamma"),
    "weight_quantization": Block(
        {
            "enabled": NoEffect("", BOOL, True),
            **{
                key: NoEffect("", ANY)
                for key in ("num_bits", "q_type", "q_groups", "quantized_initialization", "post_init_quant")
            },
        },
        "enabled",
        "loading quantized weights",
    ),
    "elasticity": off_block(
        "elastic batch sizes",
        *("max_train_batch_size", "micro_batch_sizes", "min_gpus", "max_gpus", "min_time", "version"),
        *("prefer_larger_batch", "ignore_non_elastic_batch_info", "num_gpus_per_node", "model_parallel_size"),
        instead="Give the batch sizes; a checkpoint goes on with any number of ranks that divides the batch.",
    ),
}


def convert(found: Import) -> None:
    """batch, memory.offload_activations."""
    for key, target in zip(BATCH_KEYS, ("global", "micro", "accumulation"), strict=True):
        if found.has(key):
            found.put(key, f"batch.{target}", found.get(key))
    offload = "activation_checkpointing.cpu_checkpointing"
    if found.has(offload):
        found.put(offload, "memory.offload_activations", found.get(offload))
