"""What the cost model needs to know of a model, read off its parameters on the meta device and its plan."""

from __future__ import annotations

from dataclasses import replace

from trainwright.config import Recipe
from trainwright.models import ModelConfig, build_model, count_flops, count_parameters, model_plan
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.counting import sizes_of
from trainwright.planner.facts import ModelFacts, ModelShape
from trainwright.planner.trained import block_sizes, training_of

__all__ = ["model_facts", "model_shape"]


def model_facts(
    config: ModelConfig,
    sequence_length: int,
    recipe: Recipe | None = None,
    *,
    positions: float | None = None,
    labelled: float = 1.0,
) -> ModelFacts:
    """Size, compute per trained token at `sequence_length`, and shape of a model; nothing is allocated.

    Args:
        recipe: what is trained of it; None trains all.
        positions: that a row costs on average, padding included; None takes `sequence_length`.
        labelled: of these, the share that a loss is taken of.

    Raises:
        ConfigError: the recipe's adapter or its frozen parts do not fit the model.
    """
    if isinstance(config, HuggingFaceConfig):
        whole = _of_transformers(config, sequence_length)
    else:
        whole = _of_native(config, sequence_length)
    if recipe is None:
        return whole
    training = training_of(config, sequence_length, recipe, positions=positions, labelled=labelled)
    return replace(whole, training=training)


def _of_native(config: ModelConfig, sequence_length: int) -> ModelFacts:
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
    return ModelFacts(
        parameters=sizes.parameters,
        flops_per_token=count_flops(config, sequence_length),
        layers=max(1, len(sizes.blocks)),
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
    inside: list[tuple[str, int]] = []
    for name, size in sizes.items():
        if name.startswith(f"{plan.blocks}."):  # "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj.weight"
            inside.append((name.removeprefix(f"{plan.blocks}.").partition(".")[2], size))
    blocks = block_sizes(inside, plan.linears)
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
        block=blocks.total // layers,
        block_whole=blocks.whole // layers,
        block_kv=blocks.kv // layers,
        block_experts=blocks.experts // layers,
        embedding=embedding,
        head=head + (embedding if tied else 0),
        tied=tied,
        positions=sum(size for name, size in sizes.items() if name.rpartition(".")[0] in before),
        experts=routed,
        experts_per_token=getattr(config, "experts_per_token", 0) if routed else 0,
        config=config,
    )
