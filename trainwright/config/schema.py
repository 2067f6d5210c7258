"""The recipe: one frozen value that says everything about a run. Each section stands in its own file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic.json_schema import GenerateJsonSchema

from trainwright.config.data_section import DataSection
from trainwright.config.fields import Words, plain
from trainwright.config.model_section import ModelSection
from trainwright.config.optim_section import OPTIMIZERS, SCHEDULES, AdamW, OptimSection
from trainwright.config.run_section import CheckpointSection, MonitorSection, RunSection
from trainwright.config.section import Section
from trainwright.config.train_section import Task, TaskSection, TrainSection

__all__ = ["Precision", "Recipe", "json_schema"]

Precision = Literal["auto", "bf16", "bf16_pure", "fp32"]


class Recipe(Section):
    """A whole run: model, data, task, training, optimizer, precision, checkpoints, monitoring."""

    model: ModelSection
    """What is trained: a named size, a folder, a Hugging Face name, or a configuration."""
    data: DataSection
    """Which texts, how they become tokens, and how tokens become rows."""
    task: Task = TaskSection()
    """What is learnt: a name, or a section with the name and its options."""
    train: TrainSection = TrainSection(tokens="auto")
    """How long, in what batches, how checked, and what happens when it goes wrong."""
    optim: OptimSection = AdamW()
    """The optimizer, its schedule, and rules for groups of parameters."""
    precision: Annotated[Precision, Words(("auto", "bf16", "bf16_pure", "fp32"))] = "auto"
    """bf16: fp32 weights, bf16 products; bf16_pure: bf16 weights too, an fp32 copy in the optimizer; fp32."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Resumable state on disk."""
    monitor: MonitorSection = MonitorSection()
    """What is shown and recorded."""
    run: RunSection = RunSection()
    """Name, place and small print of the run."""

    def problems(self) -> Any:
        if self.data.validation == "none":
            if self.train.early_stopping is not None:
                yield "train", "no early_stopping: data.validation is none"
            if self.train.eval_every not in ("auto", "never"):
                yield "train", "eval_every auto or never: data.validation is none"


class _SchemaGenerator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return dft.to_dict() if isinstance(dft, Section) else plain(dft)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema(schema_generator=_SchemaGenerator)
    for variants, default in ((SCHEDULES, "wsd"), (OPTIMIZERS, "adamw")):
        for name, section in variants.items():
            # In Python every variant reads every name, to refuse a wrong one by name; JSON schema needs them apart.
            definition = schema["$defs"][section.__name__]
            definition["properties"]["name"]["enum"] = [name]
            if name != default:
                definition.setdefault("required", []).append("name")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Trainwright recipe"
    return schema
