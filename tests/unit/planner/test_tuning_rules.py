"""What "auto" means for fine-tuning: rates, decay, warm-up, epochs and batches of examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainwright.config import load_recipe
from trainwright.planner import DataFacts, MachineFacts, ModelFacts, Plan, TuningFacts, resolve
from trainwright.planner.rules import choose_learning_rate

MACHINE = MachineFacts(
    kind="cpu", name="test CPU", cores=2, memory_bytes=64 * 2**30, bf16=False, compiler=None, peak={"fp32": 0.2e12}
)
TEXTS = DataFacts(
    train_rows=8_500,
    validation_rows=900,
    sequence_length=128,
    trained_per_row=1.0,
    vocab_size=8192,
    computed_per_row=30.0,
    records=True,
)
RUNNING = DataFacts(train_rows=20_000, validation_rows=400, sequence_length=256, trained_per_row=256.0, vocab_size=8192)


def model_of(width: int) -> ModelFacts:
    return ModelFacts(parameters=15_000_000, flops_per_token=90e6, layers=6, width=width, vocab_size=8192)


def plan_of(tuning: TuningFacts, data: DataFacts = TEXTS, width: int = 768, **train: object) -> Plan:
    recipe = {
        "model": {"preset": "llama-15m"},
        "data": {"source": "python-stdlib", "sequence_length": data.sequence_length},
        **({"train": train} if train else {}),
    }
    return resolve(load_recipe(recipe).recipe, MACHINE, data, model_of(width), tuning)


def decided(plan: Plan) -> dict[str, object]:
    return {decision.key: decision.value for decision in plan.decisions}


def test_fine_tuning_an_encoder() -> None:
    plan = plan_of(TuningFacts(pretrained=True, task="classification", kind="encoder"))
    values = decided(plan)
    assert values["optim.lr"] == 5e-5
    assert values["optim.weight_decay"] == 0.01
    assert plan.batch_rows == 32
    assert plan.steps == 797  # 3 epochs of 8,500 texts, 32 at a time
    assert values["optim.schedule.warmup"] == "48 steps"


def test_the_plan_says_what_is_counted() -> None:
    text = plan_of(TuningFacts(task="classification"), replace(TEXTS, counted="texts"), epochs=2).describe()
    assert "8.5k training texts in 8,500 rows" in text
    assert "MFLOP per trained text\n" in text
    assert "2 epochs of 8,500 texts / 32 trained texts per step" in text
    assert "texts/s" in text
    assert "token" not in text.split("decided")[0]


def test_from_scratch_examples_get_more_epochs_and_a_bounded_rate() -> None:
    plan = plan_of(TuningFacts(task="classification", kind="encoder"))
    values = decided(plan)
    assert plan.tokens == pytest.approx(85_000, abs=32)
    assert values["optim.lr"] == 1e-3
    assert values["optim.weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("tuning", "width", "rate"),
    [
        (TuningFacts(pretrained=True, task="sft"), 4096, 2e-5),
        (TuningFacts(pretrained=True, task="sft", adapter=True), 4096, 2e-4),
        (TuningFacts(pretrained=True, task="sft"), 512, 1.6e-4),
        (TuningFacts(pretrained=True, task="sft"), 64, 5e-4),
        (TuningFacts(pretrained=True, task="sft", adapter=True), 64, 2e-3),
        (TuningFacts(pretrained=True, task="ner", kind="encoder"), 128, 3e-4),
        (TuningFacts(pretrained=True, task="ner", kind="encoder", adapter=True), 768, 5e-4),
        (TuningFacts(pretrained=True, task="translation", kind="encoder_decoder"), 768, 5e-5),
        (TuningFacts(pretrained=True, task="masked_lm", kind="encoder"), 768, 1e-4),
    ],
)
def test_rates_of_pretrained_models_follow_task_adapter_and_width(tuning: TuningFacts, width: int, rate: float) -> None:
    assert choose_learning_rate(model_of(width), 10**6, optimizer="adamw", tuning=tuning)[0] == pytest.approx(rate)


def test_a_language_model_that_goes_on_takes_a_tenth() -> None:
    scratch, _ = choose_learning_rate(model_of(768), 10**9, optimizer="adamw")
    onwards, reason = choose_learning_rate(model_of(768), 10**9, optimizer="adamw", tuning=TuningFacts(pretrained=True))
    assert float(onwards) == pytest.approx(float(scratch) / 10, rel=0.05)
    assert "forget" in reason


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "muon_original", "sgd", "adafactor"])
def test_every_optimizer_is_gentler_with_a_pretrained_model(optimizer: str) -> None:
    model = model_of(768)
    scratch, _ = choose_learning_rate(model, 10**7, optimizer=optimizer)
    tuned, _ = choose_learning_rate(
        model, 10**7, optimizer=optimizer, tuning=TuningFacts(pretrained=True, task="ner", kind="encoder")
    )
    assert float(tuned) < float(scratch) / 5


def test_running_text_is_planned_as_before() -> None:
    plan = plan_of(TuningFacts(), RUNNING, 384)
    assert plan.steps * plan.batch_rows == pytest.approx(4 * RUNNING.train_rows, rel=0.01), "4 epochs bound it"


def test_a_given_budget_stands() -> None:
    assert plan_of(TuningFacts(pretrained=True, task="sft"), steps=11).steps == 11
    assert plan_of(TuningFacts(pretrained=True, task="sft"), epochs=1).tokens == pytest.approx(8_500, abs=32)


def test_metrics_are_taken_on_all_examples_and_seldom_where_that_is_dear() -> None:
    tuning = TuningFacts(pretrained=True, task="classification", kind="encoder")
    plan = plan_of(tuning)
    assert decided(plan)["train.eval_tokens"] == "all"
    assert decided(plan)["train.eval_every"] == f"{plan.steps // 10} steps"
    many = replace(TEXTS, validation_rows=5_000)
    values = decided(plan_of(tuning, many))
    assert values["train.eval_tokens"] == 2_000 * TEXTS.sequence_length
    assert values["train.eval_every"] == f"{plan.steps // 9} steps"
    halves = replace(TEXTS, train_rows=300, validation_rows=300)
    plan = plan_of(tuning, halves)
    assert decided(plan)["train.eval_every"] == f"{plan.steps // 3} steps"
