"""The rules behind "auto": each a pure function from facts to a value and the reason, in the order they are applied.

Sources: Chinchilla, arXiv 2203.15556 (tokens per parameter); data-constrained scaling, arXiv 2305.16264 (epochs);
DeepSeek LLM, arXiv 2401.02954 (batch size and learning rate from compute); Muon, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import math

from trainwright.parallel.pipeline.rules import pipeline_problems
from trainwright.planner.cost import predict_memory
from trainwright.planner.division import Division
from trainwright.planner.facts import DataFacts, MachineFacts, ModelFacts
from trainwright.planner.tuning import TuningFacts

__all__ = [
    "Choice",
    "choose_batch_tokens",
    "choose_compile",
    "choose_deterministic",
    "choose_epochs",
    "choose_evaluation",
    "choose_evaluation_rows",
    "choose_learning_rate",
    "choose_micro_batch",
    "choose_precision",
    "choose_steps",
    "choose_threads",
    "choose_tokens",
    "choose_vocab_size",
    "choose_warmup",
    "choose_weight_decay",
]

Choice = tuple[int | float | str | bool, str]
"""A value and the reason for it."""

TOKENS_PER_PARAMETER = 20
MAX_EPOCHS = 4
MIN_STEPS = 200
COMPILE_SECONDS = 45  # measured: forward and backward of one llama block on 2 CPU cores, cold cache
CPU_MICRO_BATCH_TOKENS = 4096  # measured on 2 cores: larger micro-batches gain nothing and fall out of the cache
CUDA_MICRO_BATCH_TOKENS = 32768
MICRO_BATCHES_PER_STAGE = 4  # (p - 1) / (4 p + p - 1) < 1/5 of the time is waited in 1F1B
TUNING_ROWS = (8, 32)  # examples of one step: what BERT and SFT recipes use
RECORDS_LIMIT = 1e-3  # a step over a few examples is noisier than one of a language model
EVALUATED_EXAMPLES = 2000
MEMORY_SHARE = 0.7  # of what is free after weights, gradients and optimizer state


def choose_precision(machine: MachineFacts) -> Choice:
    """bf16 wherever the hardware multiplies it, otherwise fp32."""
    if not machine.bf16:
        return "fp32", f"{machine.name} has no bf16 matrix units"
    # The measured gain is shown, not used: on a busy machine it wavers, and a run's arithmetic must not waver with it.
    gain = machine.peak["bf16"] / machine.peak["fp32"]
    return "bf16", f"the hardware multiplies bf16, at {gain:.1f}x the rate of fp32 (measured)"


def choose_threads(machine: MachineFacts) -> Choice:
    """What OMP_NUM_THREADS asks for, else all cores that a rank has."""
    if machine.threads is None or machine.threads == machine.cores:
        return machine.cores, "all usable cores"
    return machine.threads, f"OMP_NUM_THREADS={machine.threads}"


def choose_vocab_size(tokenizer_size: int) -> Choice:
    """The tokenizer's size; from 1,024 on rounded up to a multiple of 64, which matrix kernels like."""
    if tokenizer_size < 1024 or tokenizer_size % 64 == 0:
        return tokenizer_size, "the tokenizer's size"
    return math.ceil(tokenizer_size / 64) * 64, f"the tokenizer's {tokenizer_size:,} rounded up to a multiple of 64"


def choose_tokens(model: ModelFacts, data: DataFacts) -> Choice:
    """20 tokens per parameter (compute-optimal), but at most 4 epochs, up to which repeating is as good as new text."""
    ideal = TOKENS_PER_PARAMETER * model.parameters
    ceiling = MAX_EPOCHS * data.train_tokens
    if ideal <= ceiling:
        return ideal, f"{TOKENS_PER_PARAMETER} tokens per parameter (arXiv 2203.15556)"
    return ceiling, (
        f"{MAX_EPOCHS} epochs of {data.train_tokens:,} tokens; {TOKENS_PER_PARAMETER} tokens per parameter would be"
        f" {ideal:,}, but repeating further gains little (arXiv 2305.16264)"
    )


def choose_epochs(tuning: TuningFacts) -> Choice:
    """Passes over examples: 3 for a pretrained model, 10 from scratch."""
    if tuning.pretrained:
        return 3, "usual for fine-tuning (BERT, arXiv 1810.04805)"
    return 10, "a model from scratch needs more than the 3 of a pretrained one"


def _compute(model: ModelFacts, tokens: int) -> float:
    return max(model.flops_per_token * tokens, 1e9)


def choose_batch_tokens(model: ModelFacts, data: DataFacts, tokens: int, *, ranks: int = 1, stages: int = 1) -> Choice:
    """B = 0.292 C^0.327 tokens for C training FLOPs, in whole rows, and at least 200 steps in the run.

    Args:
        ranks: those with rows of their own, which all get equally many.
        stages: of a pipeline, each of which needs a micro-batch to work on.
    """
    if data.records:
        return _batch_of_examples(data, tokens, ranks=ranks, stages=stages)
    law = 0.2920 * _compute(model, tokens) ** 0.3271
    rows = max(1, round(min(law, tokens / MIN_STEPS) / data.sequence_length))
    rows = min(_round_to_even_split(rows), max(1, data.train_rows))
    each = ranks * stages
    rows = max(1, round(rows / each)) * each
    reason = f"0.292 C^0.327 = {law:,.0f} tokens (arXiv 2401.02954)"
    if law > tokens / MIN_STEPS:
        reason += f", cut so that the run has {MIN_STEPS} steps"
    shared = f", {rows // ranks} for each of {ranks} processes" if ranks > 1 else ""
    shared += f", a multiple of the pipeline's {stages} micro-batches" if stages > 1 else ""
    return rows * data.sequence_length, f"{reason}; {rows} rows of {data.sequence_length}{shared}"


def _batch_of_examples(data: DataFacts, tokens: int, *, ranks: int, stages: int) -> Choice:
    """As many examples as leave the run 200 steps, from 8 to 32."""
    least, most = TUNING_ROWS
    shown = tokens / data.trained_per_row
    rows = min(max(_round_to_even_split(round(shown / MIN_STEPS)), least), most, max(1, data.train_rows))
    each = ranks * stages
    rows = max(1, round(rows / each)) * each
    return rows * data.sequence_length, f"{rows} rows: {MIN_STEPS} steps if {least} to {most} rows make so many"


def _round_to_even_split(rows: int) -> int:
    """Up to 8 rows as they are, beyond that the nearest multiple of 8, so that micro-batches divide them."""
    return rows if rows <= 8 else 8 * round(rows / 8)


def choose_steps(trained_per_step: float, *, tokens: float, what: str, counted: str) -> Choice:
    """Optimizer steps that train `tokens` tokens (texts, words: `counted`), at least one."""
    return max(1, math.ceil(tokens / trained_per_step - 1e-9)), (
        f"{what} / {trained_per_step:,.0f} trained {counted} per step"
    )


def choose_micro_batch(
    model: ModelFacts,
    data: DataFacts,
    machine: MachineFacts,
    *,
    batch_rows: int,
    optimizer: str,
    precision: str,
    division: Division | None = None,
    run: int | None = None,
) -> Choice:
    """The most rows that fit in memory and keep the device busy, as a divisor of the batch.

    Args:
        division: how ranks divide the model; a pipeline gets as many micro-batches as keep its stages at work.
        run: micro-batches of one run of the pipeline's schedule, of which a step's are a multiple.
    """
    division = division or Division()
    one = predict_memory(
        model,
        optimizer=optimizer,
        precision=precision,
        micro_rows=1,
        sequence_length=data.sequence_length,
        micro_batches=batch_rows if division.stages > 1 else 1,
        division=division,
    )
    free = MEMORY_SHARE * (machine.memory_bytes - (one.total - one.activations))
    fits = max(1, int(free // max(one.activations, 1)))
    busy_tokens = CUDA_MICRO_BATCH_TOKENS if machine.kind == "cuda" else CPU_MICRO_BATCH_TOKENS
    busy = max(1, busy_tokens * division.context // data.sequence_length)
    limit = min(fits, busy, batch_rows)
    choices = [r for r in range(limit, 0, -1) if batch_rows % r == 0]
    if division.stages > 1:
        return _for_a_pipeline(model, division, batch_rows, choices, run)
    rows = choices[0]
    bound = "memory" if fits < min(busy, batch_rows) else f"{busy_tokens:,} tokens keep this device busy"
    if batch_rows <= min(fits, busy):
        bound = "the whole batch fits at once"
    return rows, f"{batch_rows} rows in {batch_rows // rows} micro-batch(es); {bound}"


def _for_a_pipeline(
    model: ModelFacts, division: Division, batch_rows: int, choices: list[int], run: int | None
) -> Choice:
    """The most rows with which the schedule can run and idles little; where none lets it, the smallest micro-batch."""

    def problems(rows: int) -> list[str]:
        passes = batch_rows // rows
        several = ["a rest"] if run is not None and passes % run else []
        sizes = (division.stages, division.schedule, run or passes, division.virtual)
        return several + pipeline_problems(model.layers, *sizes)

    runs = [rows for rows in choices if not problems(rows)] or choices[-1:]
    enough = [rows for rows in runs if batch_rows // rows >= MICRO_BATCHES_PER_STAGE * division.stages]
    rows = enough[0] if enough else runs[-1]
    passes = batch_rows // rows
    return rows, f"{batch_rows} rows in {passes} micro-batches, with which {division.stages} stages work"


def choose_learning_rate(
    model: ModelFacts, tokens: int, *, optimizer: str, tuning: TuningFacts | None = None, records: bool = False
) -> Choice:
    """From scratch eta = 0.3118 C^-0.125 for AdamW, at most 0.004 (0.001 for examples); a tenth of it where a language
    model goes on learning from text; what is usual for fine-tuning (`TuningFacts`) where a pretrained one learns a
    task. Other optimizers by their usual ratio to it.
    """
    tuning = tuning or TuningFacts()
    limit = RECORDS_LIMIT if records else 4e-3
    law = 0.3118 * _compute(model, tokens) ** -0.1250
    adamw = min(law, limit)
    note = f"0.3118 C^-0.125 = {law:.2e} (arXiv 2401.02954)" + (f", capped at {limit:g}" if law > limit else "")
    if tuning.pretrained and tuning.task == "causal_lm" and not tuning.adapter:
        adamw, note = adamw / 10, f"a tenth of what it would be from scratch, to forget little; {note}"
    elif tuning.pretrained:
        adamw, note = tuning.learning_rate(model.width)
    if optimizer == "adamw":
        return _two_digits(adamw), note
    if optimizer == "lion":
        return _two_digits(adamw / 5), f"a fifth of AdamW's (arXiv 2302.06675 advises 3-10x less); {note}"
    if optimizer == "muon":
        return _two_digits(adamw), f"AdamW's, whose update size Muon's is matched to (arXiv 2502.16982); {note}"
    usual, why = {
        "muon_original": (0.02, "the update has unit spectral norm, for which 0.02 is usual (Muon's authors)"),
        "sgd": (0.1, "usual for SGD with momentum"),
    }.get(optimizer, (0.01, "Adafactor's relative step at its usual size (arXiv 1804.04235)"))
    return (usual / 10, f"a tenth, for a pretrained model: {why}") if tuning.pretrained else (usual, why)


def choose_weight_decay(tuning: TuningFacts) -> Choice:
    """0.1 from scratch, 0.01 for a pretrained model."""
    if tuning.pretrained:
        return 0.01, "usual for a pretrained model (BERT, RoBERTa)"
    return 0.1, "usual for a model from scratch (GPT-3, arXiv 2005.14165)"


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def choose_warmup(steps: int, tuning: TuningFacts | None = None) -> Choice:
    """5 % of the run, at most 1,000 steps; 6 % for a pretrained model."""
    if tuning is not None and tuning.pretrained:
        return max(1, round(0.06 * steps)), "6 % of the run (RoBERTa, arXiv 1907.11692)"
    warmup = min(max(1, round(0.05 * steps)), 1000)
    return warmup, "5 % of the run, at most 1,000 steps"


def choose_compile(machine: MachineFacts, *, eager_seconds: float, native: bool = True) -> Choice:
    """Compile our own blocks when a compiler is there and the run is long enough to earn the compile time back."""
    if not native:
        return False, "blocks of transformers run as its code has them"
    if machine.kind == "cpu" and machine.compiler is None:
        return False, "no C++ compiler on PATH (install g++ or clang for about 1.7x the speed)"
    if machine.kind == "mps":
        return False, "block compilation is not reliable on this device"
    if eager_seconds < 3 * COMPILE_SECONDS:
        return False, f"about {eager_seconds:.0f} s of training would not earn back ~{COMPILE_SECONDS} s of compiling"
    return True, f"earns back ~{COMPILE_SECONDS} s of compiling (about {eager_seconds:,.0f} s without)"


def choose_deterministic(machine: MachineFacts) -> Choice:
    """True on CPU, where it costs nothing; off elsewhere."""
    if machine.kind == "cpu":
        return True, "every CPU kernel in use is deterministic for a fixed number of threads"
    return False, "deterministic kernels cost speed on this device; set it to true for bitwise equal runs"


def choose_evaluation(steps: int, data: DataFacts | None = None, *, tokens: int = 0) -> Choice:
    """Ten evaluations a run.

    Of examples each takes many rows, because metrics of few of them waver: then fewer evaluations, at least three,
    where ten would cost more than a quarter of the run's compute (a forward pass is a third of a step).
    """
    if data is None or not data.records or not data.validation_rows:
        return max(1, steps // 10), "ten times a run"
    cost = min(data.validation_rows, EVALUATED_EXAMPLES) * data.trained_per_row / 3
    times = min(10, max(3, int(0.25 * tokens / cost)))
    reason = "ten times a run" if times == 10 else f"{times} times a run: more would cost over a quarter of it"
    return max(1, steps // times), reason


def choose_evaluation_rows(data: DataFacts, *, tokens: int, evaluations: int) -> Choice:
    """All validation rows when that costs under 10 % of the run's compute (a forward pass is a third), else fewer.

    Of examples all, up to 2,000: with so many the standard error of an accuracy is about 1 %.
    """
    if data.records:
        if data.validation_rows <= EVALUATED_EXAMPLES:
            return "all", "metrics of few examples waver"
        return EVALUATED_EXAMPLES * data.sequence_length, (
            f"{EVALUATED_EXAMPLES:,} of {data.validation_rows:,} rows: the error of an accuracy is about 1 % then"
        )
    budget_tokens = 0.1 * tokens * 3 / max(evaluations, 1)
    rows = max(1, int(budget_tokens / data.sequence_length))
    if rows >= data.validation_rows:
        return "all", "the whole validation split costs under 10 % of the run"
    return rows * data.sequence_length, f"{rows} of {data.validation_rows} rows: 10 % of the run's compute"
