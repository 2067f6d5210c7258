"""The parameters that the planner says a rank holds, beside those that a divided model really has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainwright.comm.layout import SCHEDULES, PipelineLayout
from trainwright.comm.mesh import Axis
from trainwright.models import GPT2Config, LlamaConfig, ModelConfig, build_model
from trainwright.models.moe.config import MoEConfig
from trainwright.parallel.expert.apply import apply_expert
from trainwright.parallel.pipeline.split import split_model
from trainwright.parallel.tensor import apply_tensor
from trainwright.planner.division import Division, rank_part
from trainwright.planner.model_facts import model_facts
from trainwright.testing import run_ranks

LLAMA = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=6, num_heads=4, num_kv_heads=1, head_dim=16
)
GPT2 = GPT2Config(vocab_size=128, hidden_size=64, num_layers=6, num_heads=4, intermediate_size=128)
MOE = MoEConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=4,
    experts_per_token=2,
    expert_size=32,
)
CONFIGS: dict[str, ModelConfig] = {"llama": LLAMA, "gpt2": GPT2, "moe": MOE}


def held(model: nn.Module) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def final_norm(config: ModelConfig) -> int:
    """The planner counts it with no part: a few thousand numbers beside billions."""
    return config.hidden_size * (2 if isinstance(config, GPT2Config) else 1)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_of_a_pipeline(name: str, schedule: str) -> None:
    config = CONFIGS[name]
    facts = model_facts(config, 32)
    virtual = 1 if schedule in ("gpipe", "1f1b") else 2
    layout = PipelineLayout(3, schedule, virtual)
    for stage in range(3):
        model = split_model(build_model(config, device="meta"), Axis("pipeline", stage, 3), layout)
        predicted = rank_part(facts, Division(stages=3, schedule=schedule, virtual=virtual), stage).parameters
        assert held(model) - predicted in (0, final_norm(config)), stage


def divided(rank: int, world: int) -> dict[str, int]:
    """Parameters of this rank under tensor and under expert parallelism."""
    mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("all",))

    def axis(name: str) -> Axis:
        return Axis(name, rank, world, dist.group.WORLD, mesh)

    found = {name: held(apply_tensor(build_model(config, seed=1), axis("tensor"))) for name, config in CONFIGS.items()}
    found["experts"] = held(apply_expert(build_model(MOE, seed=1), axis("expert")))
    model = apply_tensor(build_model(MOE, seed=1), axis("tensor"))
    found["moe"] = held(apply_expert(model, Axis.alone("expert"), tensor=axis("tensor")))
    return found


def test_tensor_and_expert_ranks() -> None:
    counted = run_ranks(divided, 2)
    assert counted[0] == counted[1]
    for name, config in CONFIGS.items():
        predicted = rank_part(model_facts(config, 32), Division(tensor=2)).parameters
        assert counted[0][name] == predicted + final_norm(config), name
    predicted = rank_part(model_facts(MOE, 32), Division(expert=2)).parameters
    assert counted[0]["experts"] == predicted + final_norm(MOE)
