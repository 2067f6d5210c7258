"""A loop of one's own under layouts that divide the model: the same three calls, the same training as one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.base.errors import ConfigError
from trainwright.comm import ALONE, start
from trainwright.comm.ranks import Ranks
from trainwright.engine.initialize import initialize
from trainwright.engine.pipelined import Pipelined
from trainwright.models import LlamaConfig, build_model
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_llama_config

STEPS = 4
ROWS, TOKENS = 8, 16


def hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def config(parallel: dict[str, Any], rows_ranks: int) -> dict[str, Any]:
    return {
        "batch": {"global": ROWS, "accumulation": 4 // rows_ranks},
        "optim": {"name": "adamw", "lr": 1e-2, "clip_norm": 1.0, "eps": 1e-3},
        "precision": "fp32",
        "parallel": parallel,
        "seed": 1,
    }


def rows_of(step: int, engine: Any) -> torch.Tensor:
    place, places = engine.data_parallel.mesh.rows
    ids = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    return ids.chunk(places)[place]


def three_calls(parallel: dict[str, Any], ranks: Ranks, rows_ranks: int = 1) -> list[float]:
    """Losses of the steps as the loop sees them, then a checksum of all parameters of this rank."""
    engine = initialize(model=hugging_face(), config=config(parallel, rows_ranks), ranks=ranks).engine
    seen = []
    for step in range(STEPS):
        losses = []
        for ids in rows_of(step, engine).split(engine.batch.micro):
            output = engine(input_ids=ids, labels=ids)
            engine.backward(output.loss)
            losses.append(output.loss)
            engine.step()
        assert engine.last_report is not None
        seen += [float(engine.last_report.loss), float(engine.last_report.grad_norm), float(losses[0].isfinite())]
    assert engine.global_steps == STEPS
    engine.eval()  # between steps, without a backward: the loss is there at once
    ids = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(STEPS))
    with torch.no_grad():
        seen.append(float(engine(input_ids=ids, labels=ids).loss))
    engine.train()
    if engine.data_parallel.mesh.pipeline.size > 1:
        engine(input_ids=ids, labels=ids)
        with pytest.raises(ConfigError, match="never came to backward"):
            engine(input_ids=ids, labels=ids)
    engine.destroy()
    return seen


def whole_batches(parallel: dict[str, Any], ranks: Ranks, rows_ranks: int = 1) -> list[float]:
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=64, num_layers=4)), seed=2)
    settings = config(parallel, rows_ranks)
    # A rule and a pattern for what only one stage of a pipeline has.
    settings["optim"]["rules"] = [{"pattern": "embed_tokens", "lr_scale": 0.5}]
    settings["precision"] = {"name": "fp32", "keep_fp32": [r"model\.norm$"]}
    engine = initialize(model=model, config=settings, ranks=ranks).engine
    seen = []
    for step in range(STEPS):
        ids = rows_of(step, engine)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        # 15 tokens would not divide over ranks: one more, which is not trained.
        batch = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 1)),
            "labels": torch.nn.functional.pad(batch["labels"], (0, 1), value=-100),
        }
        engine.forward_backward(CausalLM().loss, batch, micro_rows=engine.batch.micro)
        report = engine.step()
        assert report is not None
        seen += [float(report.loss), float(report.grad_norm)]
        if isinstance(engine._schedule, Pipelined):
            together = {action.micro_batch for action in engine._schedule.runner.actions if action.kind == "F"}
            assert len(together) == (engine.accumulation if parallel["pipeline"] == 2 else 2)
    engine.destroy()
    return seen


def under_layouts(rank: int, world: int) -> list[list[float]]:
    torch.set_num_threads(1)
    ranks = start()
    kept = {**config({"zero": 1}, 2), "precision": {"name": "bf16", "keep_fp32": ["lm_head"]}}
    with pytest.raises(ConfigError, match="names the head"):
        initialize(model=build_model(LlamaConfig(**tiny_llama_config())), config=kept, ranks=ranks)
    found = [
        three_calls({"pipeline": 2}, ranks),
        three_calls({"tensor": 2, "zero": 0}, ranks),
        three_calls({"zero": 3}, ranks, rows_ranks=2),
    ]
    twice = {"pipeline": {"stages": 2, "schedule": "gpipe", "micro_batches": 2}}
    for parallel in ({"pipeline": 2}, twice, {"context": 2, "zero": 1}, {"tensor": 2}):
        found.append(whole_batches(parallel, ranks))
    return found


def test_the_same_loop_over_a_pipeline_tensor_ranks_and_context_ranks() -> None:
    expected = [three_calls({"zero": 0}, ALONE)] * 3 + [whole_batches({"zero": 0}, ALONE)] * 4
    for found in run_ranks(under_layouts, 2, timeout=150):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def stages_of_tensor_ranks(rank: int, world: int) -> list[float]:
    torch.set_num_threads(1)
    return three_calls({"pipeline": 2, "tensor": 2}, start())


@pytest.mark.slow
def test_the_same_loop_over_stages_of_tensor_ranks() -> None:
    expected = three_calls({"zero": 0}, ALONE)
    for found in run_ranks(stages_of_tensor_ranks, 4, timeout=150):
        assert found == pytest.approx(expected, rel=1e-5)
