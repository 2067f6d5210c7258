"""What a pipeline composes with: Hugging Face stacks, experts, recomputing, compiled blocks, precision, dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.base.errors import ConfigError
from trainwright.base.events import listening
from trainwright.comm.layout import PipelineLayout
from trainwright.comm.mesh import Axis
from trainwright.engine.compile import compile_blocks
from trainwright.memory import apply_recompute
from trainwright.models import GPT2Config, LlamaConfig, MoEConfig, build_model
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.parallel.pipeline import PipelineRunner, alias_parameters, idle_share, split_model
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH, VOCABULARY, MICRO = 8, 12, 64, 4
CPU = torch.device("cpu")
TASK = CausalLM()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}


def llama(**changes: Any) -> nn.Module:
    return build_model(LlamaConfig(**tiny_llama_config(num_layers=4, vocab_size=VOCABULARY, **changes)), seed=1)


def gpt2(**changes: Any) -> nn.Module:
    sizes = tiny_gpt2_config(num_layers=4, vocab_size=VOCABULARY)
    return build_model(
        GPT2Config(**{**sizes, "attn_dropout": 0.0, "resid_dropout": 0.0, "embd_dropout": 0.0, **changes}), seed=1
    )


def moe() -> nn.Module:
    sizes = tiny_llama_config(num_layers=4, vocab_size=VOCABULARY)
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_size": 32, "auxiliary_weight": 0.1}
    return build_model(MoEConfig(**sizes, **experts), seed=1)


def hugging_face(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
        still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}  # two kinds of layers
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **more, **window, tie_word_embeddings=True))


def hugging_face_loss(model: Any, micro_batch: Mapping[str, Tensor]) -> Any:
    if hasattr(model, "pipeline_split"):
        hidden = model.hidden_states()
    else:
        hidden = model.base_model(micro_batch["input_ids"], use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    return linear_cross_entropy(hidden.flatten(0, 1), weight, micro_batch["labels"].flatten())


def one_process(model: nn.Module, loss: Callable[..., Any], autocast: bool = False) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    rows = ROWS // MICRO
    for number in range(MICRO):
        piece = {name: value[number * rows : (number + 1) * rows] for name, value in batch().items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = loss(model, piece)
        output.loss_sum.backward()
        total += float(output.loss_sum.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_beside(model: nn.Module, known: dict[str, Tensor], factor: float = 1.0) -> float:
    aliases = alias_parameters(model)
    differences = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = known[aliases.get(name, name)]
        differences.append(float((parameter.grad / factor - expected).abs().max() / expected.abs().max()))
    return max(differences)


def total_of(sums: tuple[Tensor, Tensor]) -> float:
    both = torch.stack([part.double() for part in sums])
    dist.all_reduce(both)
    assert int(both[1]) == ROWS * LENGTH
    return float(both[0])


def beside(
    build: Callable[[], nn.Module],
    loss: Callable[..., Any],
    axis: Axis,
    schedule: str,
    *,
    treat: Callable[[nn.Module], object] = lambda model: None,
    autocast: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """How far a pipeline of this model is from one process, and what it did."""
    expected, known = one_process(build(), loss, autocast)
    virtual = 1 if schedule in ("1f1b", "gpipe") else 2
    model = split_model(build(), axis, PipelineLayout(axis.size, schedule, virtual))
    treat(model)
    context: Any = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else None
    if context is not None:
        options["autocast"] = context
    runner = PipelineRunner(model, axis, device=CPU, **options)
    found = total_of(runner.forward_backward(loss, batch(), micro_batches=MICRO))
    return {
        "loss": abs(found - expected) / expected,
        "gradients": gradients_beside(model, known),
        "kinds": sorted({action.kind for action in runner.actions}),
    }


def hugging_face_cases(rank: int, world: int) -> list[dict[str, Any]]:
    axis = Axis("pipeline", rank, world, dist.group.WORLD)
    cases = [("llama", "1f1b"), ("llama", "zbv"), ("qwen2", "interleaved"), ("gpt2", "1f1b"), ("gpt2", "zbv")]
    return [beside(lambda k=kind: hugging_face(k), hugging_face_loss, axis, schedule) for kind, schedule in cases]  # type: ignore[misc]


def test_hugging_face_stacks_are_split_by_structure() -> None:
    pytest.importorskip("transformers")
    for results in run_ranks(hugging_face_cases, 2, timeout=240):
        for result in results:
            assert result["loss"] < 1e-5, results
            assert result["gradients"] < 1e-5, results


def test_hugging_face_models_with_more_in_their_trunk_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    axis, layout = Axis("pipeline", 0, 2), PipelineLayout(2)
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, head_dim=8, vocab_size=VOCABULARY))
    with pytest.raises(ConfigError, match="multiply their embedding"):
        split_model(gemma, axis, layout)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=4, n_head=2, vocab_size=VOCABULARY)
    )
    with pytest.raises(ConfigError, match="word_embeddings_layernorm"):
        split_model(bloom, axis, layout)


def composed(rank: int, world: int) -> dict[str, Any]:
    axis = Axis("pipeline", rank, world, dist.group.WORLD)
    found = {
        "recompute 1f1b": beside(
            llama, TASK.loss, axis, "1f1b", treat=lambda m: apply_recompute(m, "full", blocks=blocks(m))
        ),
        "recompute zbv": beside(
            llama, TASK.loss, axis, "zbv", treat=lambda m: apply_recompute(m, "full", blocks=blocks(m))
        ),
        "plain zbv": beside(llama, TASK.loss, axis, "zbv"),
        "moe 1f1b": beside(moe, TASK.loss, axis, "1f1b"),
        "moe zbv": beside(moe, TASK.loss, axis, "zbv"),
        "bf16": beside(llama, TASK.loss, axis, "1f1b", autocast=True),
        "bf16 on the wire": beside(llama, TASK.loss, axis, "zbv", autocast=True, wire=torch.bfloat16),
    }
    found["steps"] = accumulated(axis)
    found["refused"] = refused(axis)
    found["traced"] = traced(axis)
    found["prepared"] = prepared(axis)
    return found


def blocks(model: Any) -> list[nn.Module]:
    return [block for _, block in model.blocks.named_children()]


def accumulated(axis: Axis) -> float:
    """Two halves of a batch, of which only the second ends the step, scaled as for fp16, against the whole."""
    _, known = one_process(gpt2(), TASK.loss)
    model = split_model(gpt2(), axis, PipelineLayout(2))
    runner = PipelineRunner(model, axis, device=CPU)
    lasts: list[bool] = []
    for first in (True, False):
        half = {name: value[:4] if first else value[4:] for name, value in batch().items()}
        runner.forward_backward(
            TASK.loss,
            half,
            micro_batches=2,
            scale=1024.0,
            last=not first,
            begin_backward=lambda *, last: lasts.append(last),
        )
    assert lasts == [False, False, False, True], lasts
    return gradients_beside(model, known, factor=1024.0)


def refused(axis: Axis) -> list[str]:
    model = split_model(llama(), axis, PipelineLayout(2))
    runner = PipelineRunner(model, axis, device=CPU)
    messages = []
    uneven = [{name: value[:rows] for name, value in batch().items()} for rows in (2, 3)]
    for wrong in (
        lambda: runner.forward_backward(TASK.loss, batch(), micro_batches=3),
        lambda: runner.forward_backward(TASK.loss, batch(), micro_batches=1),
        lambda: runner.forward_backward(TASK.loss, uneven),
        lambda: PipelineRunner(model, axis, device=CPU, sequence_parts=5).evaluate(TASK.loss, batch(), micro_batches=2),
    ):
        try:
            wrong()
        except ConfigError as error:
            messages.append(error.message)
    return messages


def traced(axis: Axis) -> dict[str, Any]:
    model = split_model(llama(), axis, PipelineLayout(2, "interleaved", 2))
    runner = PipelineRunner(model, axis, device=CPU, traced=True)
    heard: list[Any] = []
    with listening(heard.append):
        runner.forward_backward(TASK.loss, batch(), micro_batches=4)
        runner.evaluate(TASK.evaluate, batch(), micro_batches=1)
    spans = [(start, end) for _, _, _, start, end in heard[0]["actions"]]
    return {
        "kinds": [record["kind"] for record in heard],
        "counts": [len(record["actions"]) for record in heard],
        "in order": all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans)),
        "share": idle_share(runner.actions)[axis.rank],
    }


def prepared(axis: Axis) -> float:
    """Dropout that goes by rows: the same on a pipeline, whose parts see micro-batches at different times."""

    def build() -> nn.Module:
        return gpt2(attn_dropout=0.1, resid_dropout=0.1, embd_dropout=0.1).train()

    def prepare(model: Any, micro_batch: Any) -> Any:
        model.set_dropout(seed=7, rows=micro_batch["rows"])
        return {name: value for name, value in micro_batch.items() if name != "rows"}

    rows = {**batch(), "rows": torch.arange(ROWS)}
    whole = build()
    TASK.loss(whole, prepare(whole, rows)).loss_sum.backward()
    known = {name: p.grad.clone() for name, p in whole.named_parameters()}
    model = split_model(build(), axis, PipelineLayout(2, "zbv", 2))
    runner = PipelineRunner(model, axis, device=CPU, prepare=prepare)
    runner.forward_backward(TASK.loss, rows, micro_batches=4)
    return gradients_beside(model, known)


@pytest.mark.slow
def test_a_pipeline_composes_with_what_is_done_to_its_blocks() -> None:
    for found in run_ranks(composed, 2, timeout=300):
        for name in ("recompute 1f1b", "recompute zbv", "plain zbv", "moe 1f1b", "moe zbv", "bf16"):
            assert found[name]["loss"] < 1e-5, (name, found[name])
            assert found[name]["gradients"] < 1e-5, (name, found[name])
        assert 1e-7 < found["bf16 on the wire"]["gradients"] < 0.05
        assert found["bf16 on the wire"]["loss"] < 2e-3
        assert "W" in found["plain zbv"]["kinds"]
        assert "W" not in found["recompute zbv"]["kinds"], "a recomputed block would be computed once for every matrix"
        assert found["steps"] < 1e-5
        assert found["prepared"] < 1e-5
        reasons = ("8 rows cannot be cut into 3", "keeps 2 ranks busy", "different shapes", "cannot be divided over 5")
        assert len(found["refused"]) == len(reasons)
        for message, words in zip(found["refused"], reasons, strict=True):
            assert words in message
        assert found["traced"]["kinds"] == ["pipeline", "pipeline"]
        assert found["traced"]["counts"] == [17, 2]
        assert found["traced"]["in order"]
        assert 0 <= found["traced"]["share"] < 1


def compiled(rank: int, world: int) -> list[dict[str, Any]]:
    axis = Axis("pipeline", rank, world, dist.group.WORLD)
    return [beside(llama, TASK.loss, axis, schedule, treat=compile_blocks) for schedule in ("1f1b", "zbv")]


@pytest.mark.slow
def test_compiled_blocks_run_in_a_pipeline() -> None:
    for results in run_ranks(compiled, 2, timeout=400):
        for result in results:
            assert result["loss"] < 1e-5
            assert result["gradients"] < 2e-5, "the compiler fuses differently: measured 1e-6"
            assert "W" not in result["kinds"]
