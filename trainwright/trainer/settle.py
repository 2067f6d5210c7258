"""Settle a run before anything is built: measure the machine, prepare the data, resolve every "auto"."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from trainwright.base.device import device_facts, host_memory_limit, measure_matmul_peak, openmp_threads
from trainwright.base.events import emit
from trainwright.base.text import human_bytes
from trainwright.comm import ALONE, Ranks
from trainwright.config import LoadedRecipe, Recipe
from trainwright.config.tasks import MaskedLMSection
from trainwright.data import BuildProgress, TokenDataset, build_spec, load_tokenizer, prepare_dataset
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.checks import check_answered, check_trainable, padding_share
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.spec import example_spec
from trainwright.models import ModelConfig
from trainwright.models.heads import HeadSpec
from trainwright.ops.attention import choose_backend
from trainwright.ops.cpu_runtime import tune_cpu_runtime
from trainwright.planner import DataFacts, Decision, MachineFacts, Plan, TuningFacts, resolve
from trainwright.planner.model_facts import model_facts
from trainwright.trainer.estimate import estimate_data
from trainwright.trainer.model_section import model_source, reading_of
from trainwright.trainer.task import Dataset, define_task
from trainwright.trainer.together import first_decides

__all__ = ["Settled", "machine_facts", "settle"]

NOTICE_SECONDS = 5.0
PADDED_TOGETHER = 32  # rows of a batch, where it is not known yet how many there will be
PEAK_SECONDS = 0.5  # per type: enough for a few dozen products, of which the fastest counts


@dataclass(frozen=True)
class Settled:
    """A run that only needs building.

    Attributes:
        loaded: the recipe with every "auto" replaced; its provenance names the planner's reasons.
        plan: the decisions and predictions.
        model_config: the family's configuration, vocabulary settled.
        pretrained: folder of the weights to start from, None for random ones.
        dataset: the built dataset; None in a dry run of a task that learns from running text.
        device: where the model goes.
    """

    loaded: LoadedRecipe
    plan: Plan
    model_config: ModelConfig
    pretrained: str | None
    dataset: Dataset | None
    device: torch.device


def settle(
    loaded: LoadedRecipe, *, build_data: bool = True, ranks: Ranks = ALONE, processes: int | None = None
) -> Settled:
    """Resolve a recipe against this machine and its data; the same on every rank.

    Args:
        loaded: the recipe as written.
        build_data: tokenize and pack texts that are not in the cache yet. False estimates from file sizes instead.
            Tasks made of records build in any case: only then is it known how many labels the model needs.
        ranks: the processes that train together; rank 0 measures for all.
        processes: plan for so many processes of this host although this one is alone.
    """
    source = model_source(loaded.recipe.model)
    loaded = loaded.resolve(source.task_updates(loaded.recipe.task))
    recipe = loaded.recipe
    threads = openmp_threads() or max(1, device_facts().cores // ranks.local_world)
    torch.set_num_threads(threads if recipe.train.threads == "auto" else recipe.train.threads)
    if device_facts().kind == "cpu":
        tune_cpu_runtime()
    dataset, data = ranks.first_then_others(lambda: _data(loaded, source.tokenizer, build_data))
    model_config = source.config_for(data.vocab_size, data.sequence_length, _roles(dataset))
    head = _head(recipe, dataset)
    if model_config.head != head:
        model_config = replace(model_config, head=head)
    machine = MachineFacts(**first_decides(ranks, lambda: asdict(machine_facts(ranks))))
    if processes is not None:
        machine = machine.shared_by(processes)
    tuning = TuningFacts(
        pretrained=source.pretrained is not None,
        task=recipe.task.name,
        adapter=recipe.adapter is not None,
        kind=reading_of(model_config),
    )
    facts = model_facts(
        model_config, data.sequence_length, recipe, positions=data.computed_per_row, labelled=data.labelled_share
    )
    plan = resolve(recipe, machine, data, facts, tuning)
    earlier = source.decisions(model_config, data.vocab_size)
    if recipe.model.attention == "auto" and model_config.family != "transformers":  # which chooses for itself
        masked = dataset is not None and dataset.has_document_ids
        earlier += (_attention(machine.kind, data.sequence_length, masked, model_config),)
    plan = plan.with_decisions(earlier)
    emit("plan", text=plan.describe(), plan=plan.to_dict())
    return Settled(
        loaded=loaded.resolve(plan.updates()),
        plan=plan,
        model_config=model_config,
        pretrained=source.pretrained,
        dataset=dataset,
        device=ranks.device if ranks.world > 1 else torch.device(machine.kind),
    )


def _roles(dataset: Dataset | None) -> dict[str, int | None]:
    """The ids of the tokenizer's special tokens, where data is built already."""
    if dataset is None:
        return {}
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}


class _BuildNotices:
    """Says how far a build is, every few seconds; a build that is quicker than that says nothing."""

    def __init__(self) -> None:
        self._next = NOTICE_SECONDS

    def __call__(self, progress: BuildProgress) -> None:
        if progress.seconds < self._next:
            return
        self._next = progress.seconds + NOTICE_SECONDS
        share = progress.bytes_done / max(progress.bytes_total, 1)
        emit(
            "notice",
            message=f"building data: {progress.phase} {share:.0%},"
            f" {human_bytes(progress.bytes_done)} of {human_bytes(progress.bytes_total)}",
        )


def machine_facts(ranks: Ranks = ALONE) -> MachineFacts:
    """What one rank has of the machine, with its matrix-product rates measured now (about one second)."""
    facts = device_facts()
    peak = {"fp32": measure_matmul_peak(facts.kind, torch.float32, seconds=PEAK_SECONDS)}
    if facts.bf16:
        peak["bf16"] = measure_matmul_peak(facts.kind, torch.bfloat16, seconds=PEAK_SECONDS)
    return MachineFacts(
        kind=facts.kind,
        name=facts.name,
        cores=max(1, facts.cores // ranks.local_world),
        memory_bytes=facts.memory_bytes // (ranks.local_world if facts.kind == "cpu" else 1),
        bf16=facts.bf16,
        compiler=facts.compiler,
        peak=peak,
        ranks=ranks.world,
        host_bytes=host_memory_limit() // ranks.local_world if facts.kind == "cuda" else None,
        ranks_on_host=ranks.local_world,
        threads=openmp_threads(),
    )


def _head(recipe: Recipe, dataset: Dataset | None) -> HeadSpec | None:
    """What the task puts in place of the language-model head, its labels named."""
    if not isinstance(dataset, ExampleDataset):
        return None
    definition = define_task(recipe.task, recipe.data.sequence_length)
    assert definition is not None
    return definition.bind(dataset.survey, dataset.tokenizer()).head


def _data(loaded: LoadedRecipe, tokenizer: str | None, build_data: bool) -> tuple[Dataset | None, DataFacts]:
    recipe = loaded.recipe
    section = recipe.data
    workers = None if section.workers == "auto" else section.workers
    definition = define_task(recipe.task, recipe.data.sequence_length)
    if definition is not None:
        wanted = example_spec(section, recipe.task, model_tokenizer=tokenizer)
        examples = build_examples(wanted, definition, section.cache, workers=workers, progress=_BuildNotices())
        check_trainable(examples)
        check_answered(examples)
        return examples, _example_facts(examples, recipe.task.counted)
    spec = build_spec(section, model_tokenizer=tokenizer)
    share = recipe.task.mask_share if isinstance(recipe.task, MaskedLMSection) else 1.0
    if not build_data:
        return None, replace(estimate_data(spec), learned_share=share)
    dataset = prepare_dataset(spec, section.cache, workers, progress=_BuildNotices())
    return dataset, replace(_text_facts(dataset), learned_share=share)


def _text_facts(dataset: TokenDataset) -> DataFacts:
    train = dataset.facts("train")
    return DataFacts(
        train_rows=train.rows,
        validation_rows=dataset.rows("validation") if "validation" in dataset.splits else 0,
        sequence_length=dataset.sequence_length,
        trained_per_row=train.trained_tokens / train.rows,
        vocab_size=dataset.vocab_size,
    )


def _example_facts(dataset: ExampleDataset, counted: str) -> DataFacts:
    train = dataset.facts("train")
    padding = padding_share(dataset, PADDED_TOGETHER)
    return DataFacts(
        train_rows=train.rows,
        validation_rows=dataset.rows("validation") if "validation" in dataset.splits else 0,
        sequence_length=dataset.sequence_length,
        trained_per_row=train.trained_tokens / train.rows,
        vocab_size=dataset.vocab_size,
        computed_per_row=train.inputs / train.rows / (1 - padding),
        records=True,
        counted=counted,
    )


def _attention(device: str, length: int, documents: bool, config: ModelConfig) -> Decision:
    """The backend for training's shape, by the rule of `choose_backend`; layers of one model all take the same."""
    window = min((window for window in config.layer_windows() if window is not None and window < length), default=None)
    causal = reading_of(config) == "decoder"
    choice = choose_backend(
        device, query_length=length, key_length=length, causal=causal, documents=documents, window=window
    )
    return Decision("model.attention", choice.name, choice.reason)
