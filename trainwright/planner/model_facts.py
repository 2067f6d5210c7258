"""What the cost model needs to know of a model, read off its parameters on the meta device and its plan."""

from __future__ import annotations

from collections.abc import Mapping

from trainwright.models import ModelConfig, build_model, count_flops, count_parameters, model_plan, visible_keys
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.counting import sizes_of
from trainwright.models.structure import ModelPlan
from trainwright.planner.facts import ModelFacts, ModelShape

__all__ = ["model_facts", "model_shape"]


def model_facts(config: ModelConfig, sequence_length: int) -> ModelFacts:
    """Size, compute per trained token at `sequence_length`, and shape of a model; nothing is allocated."""
    if isinstance(config, HuggingFaceConfig):
        return _of_transformers(config, sequence_length)
    return ModelFacts(
        parameters=count_parameters(config),
        flops_per_token=count_flops(config, sequence_length),
        layers=config.num_layers,
        width=config.hidden_size,
        vocab_size=config.vocab_size,
        shape=model_shape(config),
    )


def _of_transformers(config: HuggingFaceConfig, sequence_length: int) -> ModelFacts:
    """How its own code can be divided is not in numbers: the axes look at its modules when it is."""
    sizes = sizes_of(config)
    keys = sum(
        visible_keys(sequence_length, window) if config.kind == "causal_lm" else float(sequence_length)
        for window in config.layer_windows()
    )
    return ModelFacts(
        parameters=sizes.parameters,
        flops_per_token=6.0 * sizes.matmul + 12.0 * config.num_heads * config.head_dim * keys,
        layers=max(1, sizes.blocks),
        width=config.hidden_size,
        vocab_size=config.vocab_size,
        shape=ModelShape(
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_width=config.head_dim,
            mlp_width=config.intermediate_size,
            block=sizes.block,
            block_whole=0,
            block_kv=0,
            embedding=sizes.embedding,
            head=sizes.head,
            tied=sizes.tied,
        ),
        native=False,
    )


def model_shape(config: ModelConfig) -> ModelShape:
    """How a native model can be divided."""
    plan = model_plan(config)
    sizes = {name: parameter.numel() for name, parameter in build_model(config, device="meta").named_parameters()}
    inside = {name: size for name, size in sizes.items() if name.startswith(f"{plan.blocks}.")}
    # Names inside a block, added up over all blocks: "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj.weight".
    relative: dict[str, int] = {}
    for name, size in inside.items():
        short = name.removeprefix(f"{plan.blocks}.").partition(".")[2]
        relative[short] = relative.get(short, 0) + size
    experts = sum(size for name, size in relative.items() if ".experts." in f".{name}")
    embedding = sizes.get(f"{plan.embedding}.weight", 0)
    tied = bool(plan.tied)
    before = [name for name in (plan.position_embedding, *plan.embedding_rest) if name is not None]
    head = sum(size for name, size in sizes.items() if name.startswith(f"{plan.head_module}."))
    routed = getattr(config, "num_experts", 0)
    layers = plan.num_blocks
    return ModelShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_width=config.head_dim,
        mlp_width=getattr(config, "expert_size", 0) if routed else config.intermediate_size,
        block=sum(inside.values()) // layers,
        block_whole=_whole(relative, plan) // layers,
        block_kv=_key_value(relative, plan) // layers,
        block_experts=experts // layers,
        embedding=embedding,
        head=head + (embedding if tied else 0),
        tied=tied,
        positions=sum(size for name, size in sizes.items() if name.rpartition(".")[0] in before),
        experts=routed,
        experts_per_token=getattr(config, "experts_per_token", 0) if routed else 0,
        config=config,
    )


def _whole(relative: Mapping[str, int], plan: ModelPlan) -> int:
    """What no tensor rank divides: all that is neither an expert nor a divided linear's, and biases added once."""
    divided = {f"{linear.name}.weight" for linear in plan.linears}
    divided |= {f"{linear.name}.bias" for linear in plan.linears if linear.kind == "column"}
    return sum(size for name, size in relative.items() if name not in divided and ".experts." not in f".{name}")


def _key_value(relative: Mapping[str, int], plan: ModelPlan) -> int:
    names = [linear.name for linear in plan.linears if linear.serves is not None]
    return sum(size for name, size in relative.items() if name.rpartition(".")[0] in names)
