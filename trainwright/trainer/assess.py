"""A finished model on data: its task's report, and its predictions. What `trainwright eval` and `predict` do."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.data import SourceSpec, Tokenizer, build_spec, evaluation_batches, prepare_dataset
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.encoding import Refusal
from trainwright.data.examples.spec import ExampleSpec, example_spec
from trainwright.data.records.reading import read_records
from trainwright.data.records.record import SHAPES
from trainwright.data.records.record import Record as Read
from trainwright.tasks import Task
from trainwright.tasks.task import ExampleTask, GeneratingTask, Record, TaskDefinition
from trainwright.trainer.evaluation import Evaluation, evaluate
from trainwright.trainer.judge import judge, predictions, writes, written
from trainwright.trainer.model_section import model_source
from trainwright.trainer.outputs import Outputs
from trainwright.trainer.task import Dataset, define_task, make_task
from trainwright.trainer.trained import Reading, Trained
from trainwright.trainer.writing import engine_writer

__all__ = ["assess", "predict"]

DATA_SPLIT = "train"  # of a dataset that was built to be evaluated, which has only one


class _Known:
    """A task's definition that has seen its training records already."""

    def __init__(self, definition: TaskDefinition, survey: Mapping[str, Any]) -> None:
        self.name = definition.name
        self.shape = definition.shape
        self._definition = definition
        self._survey = dict(survey)

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        return self._survey

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> ExampleTask:
        return self._definition.bind(survey, tokenizer)


def _without_answers(source: SourceSpec, shape: str, **reading: Any) -> Iterator[Read]:
    """The records of a source without what is to be predicted: what stands there need not be known to the model."""
    target = SHAPES[shape].target
    for record in read_records(source, shape, answers=False, **reading):
        yield replace(record, fields={key: value for key, value in record.fields.items() if key != target})


def _examples(
    trained: Trained, source: str, cache: str, reading: Reading, *, predicted: bool = False
) -> ExampleDataset:
    """The records of a source as examples, labels and tokenizer as in training.

    Args:
        predicted: they are only predicted for: their answers are left out, and any number may give no example.
    """
    definition = _definition(trained)
    spec = ExampleSpec(
        train=(SourceSpec(source),),
        validation=None,
        tokenizer=trained.tokenizer,
        sequence_length=trained.sequence_length,
        format=reading.format,
        columns=reading.columns,
        reading=reading.more,
        max_drop=1.0 if predicted else 0.05,
    )
    reader = _without_answers if predicted else read_records
    return build_examples(spec, _Known(definition, trained.survey), cache, reader=reader)


def _definition(trained: Trained) -> TaskDefinition:
    definition = define_task(trained.section, trained.sequence_length)
    assert definition is not None, "tasks that learn from running text have no records"
    return definition


def _own_data(trained: Trained) -> Dataset:
    """The dataset that the run was trained on, from its recipe."""
    if trained.recipe is None:
        raise ConfigError(f"{trained.folder} is a model on its own: nothing says on what", hint="give --data FILE")
    recipe = trained.recipe.recipe
    tokenizer = model_source(recipe.model).tokenizer
    definition = define_task(recipe.task, recipe.data.sequence_length)
    if definition is None:
        return prepare_dataset(build_spec(recipe.data, model_tokenizer=tokenizer), recipe.data.cache)
    return build_examples(
        example_spec(recipe.data, recipe.task, model_tokenizer=tokenizer), definition, recipe.data.cache
    )


@contextmanager
def _data(
    trained: Trained, source: str | None, split: str, format: str | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[Dataset, str]]:
    """The dataset to look at and its split; what is built of a given source is gone afterwards."""
    if source is None:
        dataset = _own_data(trained)
        if split not in dataset.splits:
            raise ConfigError(
                f"the run's data has no split {split!r}; it has {', '.join(dataset.splits)}",
                hint=f"give {', '.join(f'--split {name}' for name in dataset.splits)}, or --data FILE",
            )
        yield dataset, split
        return
    with tempfile.TemporaryDirectory() as cache:
        if trained.from_records:
            yield _examples(trained, source, cache, trained.reading.of_file(format, columns)), DATA_SPLIT
            return
        if format is not None or columns:
            raise ConfigError(
                f"the task {trained.section.name} reads running text, which has no formats and columns of records",
                hint="leave out --format and --column: files are read by their ending, texts from data.text_field",
            )
        assert trained.recipe is not None, "a task that learns from text is known by its run"
        section = trained.recipe.recipe.data
        spec = build_spec(section, model_tokenizer=str(trained.folder))
        of_file = SourceSpec(source, text_field=section.text_field)
        texts = replace(spec, sources=(of_file,), tokenizer=trained.tokenizer, validation=None)
        yield prepare_dataset(texts, cache), DATA_SPLIT


def _task(trained: Trained, dataset: Dataset) -> Task:
    definition = define_task(trained.section, trained.sequence_length)
    if definition is not None:
        return definition.bind(trained.survey or getattr(dataset, "survey", {}), trained.tokenizer)
    assert trained.recipe is not None
    return make_task(trained.recipe.recipe, dataset, trained.tokenizer)


def _evaluated(trained: Trained, task: Task, dataset: Dataset, split: str, rows: int) -> tuple[Evaluation, Outputs]:
    device = next(trained.engine.model.parameters()).device
    transform = getattr(task, "prepare_batch", None)
    batches = evaluation_batches(dataset, rows, split, transform=transform)
    outputs = Outputs()
    on_device = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
    return evaluate(trained.engine, task, on_device, outputs=outputs), outputs


def assess(
    trained: Trained,
    *,
    split: str = "test",
    source: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int = 32,
    limit: int | None = None,
) -> Evaluation:
    """Loss, metrics and report of a model.

    Args:
        split: of the run's own data; without effect beside `source`.
        source: data to judge on instead.
        format: of it; "auto" looks at it, None reads it as the training data was read.
        columns: of it, in place of those that the recipe's `data.columns` names.
        rows: of one forward pass.
        limit: records that a task which writes is judged on; None takes all.

    Raises:
        ConfigError: the run has no such split, or its task reads no records of a format.
        DataError: the records cannot be read, or there are none.
    """
    with _data(trained, source, split, format, columns) as (dataset, chosen):
        task = _task(trained, dataset)
        result, outputs = _evaluated(trained, task, dataset, chosen, rows)
        if not isinstance(dataset, ExampleDataset):
            return result
        writer = engine_writer(trained.engine, rows=rows)
        judged = judge(task, dataset, chosen, outputs, trained.engine.ranks, writer=writer, limit=limit)
        return result if judged is None else replace(result, metrics=judged.metrics, report=judged.report)


def predict(
    trained: Trained, source: str, reading: Reading, *, rows: int = 32
) -> Iterator[tuple[Record, Record | Refusal]]:
    """Records of a source and what the model predicts for each, in file order, or why it cannot be predicted for.

    Answers that the records have are not looked at: they may be missing, and of labels that the model does not know.

    Raises:
        ConfigError: the task predicts nothing (a language model writes: `trainwright generate`).
        DataError: the records cannot be read, or there are none.
    """
    trained.records_shape()
    definition = _definition(trained)
    task: Any = definition.bind(trained.survey, trained.tokenizer)
    if writes(task):
        read = _without_answers(
            SourceSpec(source), definition.shape, format=reading.format, columns=reading.columns, **reading.more
        )
        records = [{**record.fields, "where": record.where} for record in read]
        if not records:
            raise DataError(f"{source} holds no records")
        yield from zip(records, _written_or_refused(trained, task, records, rows), strict=True)
        return
    with tempfile.TemporaryDirectory() as cache:
        dataset = _examples(trained, source, cache, reading, predicted=True)
        _, outputs = _evaluated(trained, task, dataset, DATA_SPLIT, rows)
        found = predictions(task, dataset, DATA_SPLIT, outputs)
        for number, record in enumerate(dataset.records_of(DATA_SPLIT)):
            yield record, found[number] if number in found else Refusal(_why_not(task, record), None)


def _written_or_refused(
    trained: Trained, task: GeneratingTask, records: Sequence[Record], rows: int
) -> list[Record | Refusal]:
    """What the model writes for each record; why it writes nothing where a record asks nothing."""
    found: list[Record | Refusal | None] = []
    for record in records:
        try:
            task.prompt(record)
            found.append(None)
        except DataError as error:
            found.append(Refusal(error.message, error.hint))
    asked = [record for record, refused in zip(records, found, strict=True) if refused is None]
    answers = iter(written(task, asked, engine_writer(trained.engine, rows=rows)))
    return [next(answers) if one is None else one for one in found]


def _why_not(task: ExampleTask, record: Record) -> str:
    """Why a record gives no example."""
    return task.encoder.encode(record).dropped or "this record gives no example"
