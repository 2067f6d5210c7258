"""Features around the data and the model: data efficiency, curricula, compression, quantization, sparse attention.

Trainwright has none of them yet, so each is refused when it is on; their keys are known all the same, so that a typo
in a section that is off is met before it is turned on.
"""

from __future__ import annotations

from trainwright.config.deepspeed.tables import ANY, BOOL, COUNT, Block, Entry, NoEffect, off_block

__all__ = ["FEATURES"]

GROUPS = "the technique's shared_parameters.enabled turns its groups on"
PARTS = "the parts inside have switches of their own"

CURRICULUM_SCHEDULE = Block(
    {
        key: NoEffect("", ANY)
        for key in ("total_curriculum_step", "difficulty_step", "root_degree", "difficulty", "max_step")
    }
)
METRIC = Block(
    {
        **{
            key: NoEffect("", ANY)
            for key in (
                *("index_to_sample_path", "index_to_metric_path", "clustering_type", "difficulty_type"),
                *("min_difficulty", "max_difficulty", "schedule_type"),
            )
        },
        "schedule_config": CURRICULUM_SCHEDULE,
    },
    named=True,
)

DATA_EFFICIENCY = Block(
    {
        "enabled": NoEffect(PARTS, BOOL, False),
        "seed": NoEffect("it seeds parts that are off", COUNT, 1234),
        "data_sampling": Block(
            {
                "enabled": NoEffect(PARTS, BOOL, False),
                "num_epochs": NoEffect("the loader goes over the data as often as it is asked to", COUNT, 1000),
                "num_workers": NoEffect("it loads data for a curriculum", COUNT, 0),
                "pin_memory": NoEffect("it loads data for a curriculum", BOOL, False),
                "curriculum_learning": off_block(
                    "curriculum learning", "data_cluster_path", inside={"curriculum_metrics": METRIC}
                ),
                "dynamic_batching": off_block(
                    "batches of variable size",
                    *("metrics_path", "lr_scaling_method", "min_batch_size", "max_batch_size"),
                    *("sequence_picking_order", "max_tokens", "verbose"),
                ),
            },
            "enabled",
        ),
        "data_routing": Block(
            {
                "enabled": NoEffect(PARTS, BOOL, False),
                "random_ltd": off_block(
                    "random layer-token dropping",
                    *("total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "model_mask_name"),
                    *("model_type", "hidden_state_order", "micro_batch_size", "global_batch_size"),
                    inside={
                        "random_ltd_schedule": Block(
                            {
                                **{
                                    key: NoEffect("", ANY)
                                    for key in ("min_value", "max_value", "schedule_type", "current_value")
                                },
                                "schedule_config": Block(
                                    {key: NoEffect("", ANY) for key in ("require_steps", "seq_per_step")}
                                ),
                            }
                        ),
                        "layer_token_lr_schedule": Block(
                            {
                                key: NoEffect("", ANY)
                                for key in (
                                    *("enabled", "total_layer_tokens", "warmup_type", "warmup_layer_tokens"),
                                    *("total_tokens", "warmup_tokens"),
                                )
                            }
                        ),
                    },
                ),
            },
            "enabled",
        ),
    },
    "enabled",
)


def _technique(
    feature: str, shared: tuple[str, ...], params: tuple[str, ...], inside: dict[str, Entry] | None = None
) -> Block:
    """One technique of the compression library: a section with the switch, and groups of modules."""
    return Block(
        {
            "shared_parameters": off_block(feature, *shared, inside=inside),
            "different_groups": Block(
                {
                    "params": Block({key: NoEffect(GROUPS, ANY) for key in params}),
                    "modules": NoEffect(GROUPS, ANY),
                    "related_modules": NoEffect(GROUPS, ANY),
                },
                named=True,
            ),
        }
    )


MIXED = Block({key: NoEffect("", ANY) for key in ("enabled", "quantize_change_ratio")})

COMPRESSION = Block(
    {
        "weight_quantization": _technique(
            "training with quantized weights",
            (
                *("quantizer_kernel", "schedule_offset", "quantize_groups", "quantize_verbose", "quantization_type"),
                *("quantize_weight_in_forward", "rounding"),
            ),
            ("start_bits", "target_bits", "quantization_period"),
            {"fp16_mixed_quantize": MIXED},
        ),
        "activation_quantization": _technique(
            "training with quantized activations",
            ("quantization_type", "range_calibration", "schedule_offset"),
            ("bits",),
        ),
        "sparse_pruning": _technique(
            "sparse pruning",
            (
                *("schedule_offset", "schedule_offset_end", "schedule_offset_stride", "method", "block_pattern"),
                *("dense_ratio", "excluded_modules"),
            ),
            ("dense_ratio",),
        ),
        "row_pruning": _technique("row pruning", ("schedule_offset", "method"), ("dense_ratio",)),
        "head_pruning": _technique("head pruning", ("schedule_offset", "method", "num_heads"), ("dense_ratio",)),
        "channel_pruning": _technique("channel pruning", ("schedule_offset", "method"), ("dense_ratio",)),
        "layer_reduction": off_block(
            "layer reduction",
            *("keep_number_layer", "keep_number_layers", "module_name_prefix", "teacher_layer", "other_module_name"),
        ),
    }
)

FEATURES: dict[str, Entry] = {
    "data_efficiency": DATA_EFFICIENCY,
    "curriculum_learning": off_block(
        "curriculum learning",
        *("curriculum_type", "min_difficulty", "max_difficulty", "schedule_type"),
        inside={"schedule_config": CURRICULUM_SCHEDULE},
    ),
    "compression_training": COMPRESSION,
    "quantize_training": off_block(
        "Mixture of Quantization",
        *("quantize_verbose", "quantizer_kernel", "quantize_type", "quantize_groups", "rounding", "schedule_offset"),
        *("quantize_weight_in_forward", "quantize_algo"),
        inside={
            "quantize_bits": Block({key: NoEffect("", ANY) for key in ("start_bits", "target_bits")}),
            "quantize_schedule": Block({key: NoEffect("", ANY) for key in ("quantize_period", "schedule_offset")}),
            "fp16_mixed_quantize": MIXED,
        },
    ),
    "eigenvalue": off_block(
        "quantization by eigenvalues",
        *("verbose", "max_iter", "tol", "stability", "gas_boundary_resolution", "layer_name", "layer_num"),
    ),
    "sparse_attention": Block(
        {
            key: NoEffect("", ANY)
            for key in (
                *("mode", "block", "different_layout_per_head", "num_local_blocks", "num_global_blocks", "attention"),
                *("horizontal_global_attention", "num_different_global_patterns", "num_random_blocks"),
                *("local_window_blocks", "global_block_indices", "global_block_end_indices"),
                *("num_sliding_window_blocks", "max_seq_length"),
            )
        },
        "",
        "sparse attention",
    ),
}
