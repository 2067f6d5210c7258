"""The planner: every "auto" settled with a reason, what is given left alone, what cannot be refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.config import load_recipe
from trainwright.models import preset
from trainwright.planner import DataFacts, MachineFacts, ModelFacts, Plan, model_facts, resolve
from trainwright.planner.cost import predict_memory
from trainwright.planner.rules import choose_compile, choose_learning_rate, choose_micro_batch, choose_vocab_size

MACHINE = MachineFacts(
    kind="cpu",
    name="test CPU",
    cores=2,
    memory_bytes=16 * 2**30,
    bf16=True,
    compiler="/usr/bin/g++",
    peak={"fp32": 0.2e12, "bf16": 0.8e12},
)
DATA = DataFacts(train_rows=20_000, validation_rows=400, sequence_length=256, trained_per_row=256.0, vocab_size=8192)
MODEL = ModelFacts(parameters=15_000_000, flops_per_token=80e6, layers=6, width=384, vocab_size=8192)


def plan_of(
    machine: MachineFacts = MACHINE, data: DataFacts = DATA, model: ModelFacts = MODEL, **sections: object
) -> Plan:
    recipe = {
        "model": {"preset": "llama-15m"},
        "data": {"source": "python-stdlib", "sequence_length": data.sequence_length},
        **sections,
    }
    return resolve(load_recipe(recipe).recipe, machine, data, model)


def decided(plan: Plan) -> dict[str, object]:
    return {decision.key: decision.value for decision in plan.decisions}


def test_every_auto_of_a_bare_recipe_is_settled_and_the_result_loads() -> None:
    loaded = load_recipe(
        {"model": {"preset": "llama-15m"}, "data": {"source": "python-stdlib", "sequence_length": 256}}
    )
    plan = resolve(loaded.recipe, MACHINE, DATA, MODEL)
    resolved = loaded.resolve(
        {**plan.updates(), "model.vocab_size": (8192, "test"), "data.tokenizer": ({"train": "bpe"}, "t")}
    )
    left = [key for key, value in resolved.values().items() if value == "auto"]
    assert set(left) <= {
        "data.validation",
        "data.workers",
        *("data.format", "data.scheme"),
        "data.document_mask",
        "data.append_eos",
        "monitor.console",
        "monitor.tensorboard",
        "model.attention",
        # What follows from the ranks and their devices is settled where these are known.
        *("parallel.zero", "parallel.shard", "parallel.accumulate", "parallel.gather"),
        "memory.recompute",
        # What follows from the task's metric.
        *("checkpoint.keep_best", "train.export"),
        *("comm.backend", "comm.wire", "launch.processes"),
    }
    assert resolved.recipe.train.steps == plan.steps
    assert all(decision.reason for decision in plan.decisions)


def test_threads_follow_the_environment_and_explicit_values_are_strongest() -> None:
    def threads(machine: MachineFacts, **train: object) -> tuple[object, str] | None:
        found = [(d.value, d.reason) for d in plan_of(machine, train=train).decisions if d.key == "train.threads"]
        return found[0] if found else None

    assert threads(MACHINE) == (2, "all usable cores")
    assert threads(replace(MACHINE, threads=1)) == (1, "OMP_NUM_THREADS=1")
    assert threads(replace(MACHINE, threads=2)) == (2, "all usable cores")
    assert threads(replace(MACHINE, threads=1), threads=2) is None, "nothing is decided where the recipe says it"


def test_resolving_twice_changes_nothing() -> None:
    loaded = load_recipe(
        {"model": {"preset": "llama-15m"}, "data": {"source": "python-stdlib", "sequence_length": 256}}
    )
    first = resolve(loaded.recipe, MACHINE, DATA, MODEL)
    again = resolve(loaded.resolve(first.updates()).recipe, MACHINE, DATA, MODEL)
    assert again.decisions == ()
    assert (again.steps, again.batch_rows, again.micro_rows, again.tokens) == (
        first.steps,
        first.batch_rows,
        first.micro_rows,
        first.tokens,
    )


def test_given_values_stand() -> None:
    plan = plan_of(train={"steps": 7, "batch_tokens": 1024, "micro_batch": 2, "compile": False}, optim={"lr": 1e-3})
    assert (plan.steps, plan.batch_rows, plan.micro_rows) == (7, 4, 2)
    assert not {"train.steps", "train.batch_tokens", "train.micro_batch", "train.compile", "optim.lr"} & set(
        decided(plan)
    )


def test_time_budget_becomes_steps_that_take_about_that_long() -> None:
    plan = plan_of(train={"time": "3 min"})
    assert decided(plan)["train.time"] is None
    assert plan.prediction.total_seconds == pytest.approx(180, rel=0.1)


def test_epochs_and_tokens_become_steps() -> None:
    assert plan_of(train={"epochs": 2}).tokens == pytest.approx(2 * DATA.train_tokens, rel=0.02)
    plan = plan_of(train={"tokens": "1M", "batch_tokens": 256 * 10})
    assert plan.steps == math.ceil(1_000_000 / 2560)


def test_padded_rows_count_trained_tokens_not_positions() -> None:
    half = replace(DATA, trained_per_row=128.0)
    plan = plan_of(data=half, train={"tokens": "1M", "batch_tokens": 256 * 10})
    assert plan.steps == math.ceil(1_000_000 / 1280)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"batch_tokens": 1000}, ["1000", "256", "use 768 or 1024"]),
        ({"batch_tokens": 100}, ["100", "use 256"]),
        ({"batch_tokens": 256 * 6, "micro_batch": 4}, ["4 does not divide", "6 rows", "is 3"]),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest(train: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(train={"steps": 10, **train})
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_fit_is_refused_with_the_sum() -> None:
    huge = replace(MODEL, parameters=8_000_000_000, layers=32, width=4096)
    with pytest.raises(MemoryLimitError, match="gradients"):
        plan_of(model=huge, train={"steps": 10})


def test_no_bf16_hardware_means_fp32() -> None:
    old = replace(MACHINE, bf16=False, peak={"fp32": 0.2e12})
    assert decided(plan_of(machine=old))["precision"] == "fp32"


def test_micro_batch_is_the_largest_divisor_that_fits() -> None:
    rows, _ = choose_micro_batch(MODEL, DATA, MACHINE, batch_rows=40, optimizer="adamw", precision="bf16")
    assert rows == 10  # 4,096 tokens are 16 rows of 256, and 10 is the largest divisor of 40 up to 16
    small = replace(MACHINE, memory_bytes=400 * 2**20)
    fewer, _ = choose_micro_batch(MODEL, DATA, small, batch_rows=40, optimizer="adamw", precision="bf16")
    assert 1 <= fewer < rows


def test_learning_rate_falls_with_compute_and_is_capped() -> None:
    small, _ = choose_learning_rate(MODEL, 10**5, optimizer="adamw")
    large, _ = choose_learning_rate(replace(MODEL, flops_per_token=6e9), 10**11, optimizer="adamw")
    assert small == pytest.approx(4e-3)
    assert 1e-4 < float(large) < 1e-3


def test_compile_says_why_not() -> None:
    assert choose_compile(replace(MACHINE, compiler=None), eager_seconds=1e6)[0] is False
    short, reason = choose_compile(MACHINE, eager_seconds=10)
    assert short is False
    assert "10 s" in reason
    assert choose_compile(MACHINE, eager_seconds=1000)[0] is True


@pytest.mark.parametrize(("size", "rounded"), [(65, 65), (1023, 1023), (8192, 8192), (8193, 8256), (50257, 50304)])
def test_vocabulary_is_rounded_only_where_it_helps(size: int, rounded: int) -> None:
    assert choose_vocab_size(size)[0] == rounded


def test_description_is_for_people() -> None:
    text = plan_of().describe()
    assert "predicted" in text
    assert "optim.lr" in text


def test_what_is_trained_decides_time_memory_and_the_plan_says_it() -> None:
    config = preset("llama-15m")
    section = {"adapter": {"name": "lora", "rank": 4}}
    recipe = load_recipe({"model": {"preset": "llama-15m"}, "data": {"source": "python-stdlib"}, **section}).recipe
    whole, adapted = model_facts(config, 256), model_facts(config, 256, recipe)
    fixed = {"train": {"steps": 10, "batch_tokens": 2048, "micro_batch": 2, "compile": False}, "optim": {"lr": 1e-3}}
    full, light = plan_of(model=whole, **fixed), plan_of(model=adapted, **fixed, **section)
    assert full.trains is None
    assert light.trains is not None
    assert light.trains in light.describe()
    assert light.prediction.memory["optimizer"] < 0.05 * full.prediction.memory["optimizer"]
    assert light.prediction.memory["gradients"] < 0.05 * full.prediction.memory["gradients"]
    assert 0.6 < light.flops_per_step / full.flops_per_step < 0.85
    assert light.prediction.step_seconds < full.prediction.step_seconds
    # What is derived from laws of scaling is the model's matter, not that of what is trained of it.
    auto = {"train": {"tokens": "1M", "compile": False}, "optim": {"lr": 1e-3}}
    assert plan_of(model=adapted, **auto, **section).batch_rows == plan_of(model=whole, **auto).batch_rows


def test_memory_that_is_saved_goes_into_the_micro_batch() -> None:
    recipe = load_recipe(
        {"model": {"preset": "llama-15m"}, "data": {"source": "python-stdlib"}, "adapter": "lora"}
    ).recipe
    config = preset("llama-15m")
    whole, adapted = model_facts(config, 256), model_facts(config, 256, recipe)
    tight = replace(MACHINE, memory_bytes=predict_memory_of_one_row(whole) + (64 << 20))
    rows = [
        choose_micro_batch(facts, DATA, tight, batch_rows=64, optimizer="adamw", precision="fp32")[0]
        for facts in (whole, adapted)
    ]
    assert rows[1] > rows[0]


def predict_memory_of_one_row(model: ModelFacts) -> int:
    return predict_memory(model, optimizer="adamw", precision="fp32", micro_rows=1, sequence_length=256).total


def test_hidden_tokens_are_what_a_masked_model_is_timed_by() -> None:
    plain, masked = plan_of(), plan_of(data=replace(DATA, learned_share=0.15))
    assert masked.prediction.tokens_per_second == pytest.approx(0.15 * plain.prediction.tokens_per_second)
    assert masked.flops_per_step == plain.flops_per_step
    assert masked.prediction.step_seconds == plain.prediction.step_seconds


def test_mfu_is_held_against_all_ranks() -> None:
    one, two = plan_of(), plan_of(machine=replace(MACHINE, ranks=2))
    assert two.peak_flops == 2 * one.peak_flops
