"""The recipe: one frozen value that says everything about a run. Each section stands in its own file."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from trainwright.config.adapter_section import Adapter
from trainwright.config.data_section import DataSection
from trainwright.config.fields import plain
from trainwright.config.launch_section import CommSection, LaunchSection
from trainwright.config.memory_section import MemorySection
from trainwright.config.model_section import ModelSection
from trainwright.config.optim_section import OPTIMIZERS, SCHEDULES, AdamW, OptimSection
from trainwright.config.parallel_section import Parallel, ParallelSection
from trainwright.config.precision_section import PRECISIONS, AutoPrecision, PrecisionSection
from trainwright.config.run_section import CheckpointSection, MonitorSection, RunSection
from trainwright.config.section import Section
from trainwright.config.tasks import TASKS, CausalLMSection, MaskedLMSection, Task
from trainwright.config.train_section import TrainSection

__all__ = ["Recipe", "json_schema"]


class Recipe(Section):
    """A whole run: model, data, task, training, optimizer, precision, ranks, memory, checkpoints, monitoring."""

    model: ModelSection
    """What is trained: a named size, a folder, a Hugging Face name, or a configuration."""
    data: DataSection
    """Which texts, how they become tokens, and how tokens become rows."""
    task: Task = CausalLMSection()
    """What is learnt: a name, or a section with the name and its options."""
    adapter: Adapter = None
    """A small addition that is trained instead of the model; null trains the model."""
    train: TrainSection = TrainSection(tokens="auto")
    """How long, in what batches, how checked, and what happens when it goes wrong."""
    optim: OptimSection = AdamW()
    """The optimizer, its schedule, and rules for groups of parameters."""
    precision: PrecisionSection = AutoPrecision()
    """Number formats of weights and matrix products: a name, or a section with the name and its options."""
    parallel: Parallel = ParallelSection()
    """How the state is spread over the ranks; auto leaves all of it open."""
    memory: MemorySection = MemorySection()
    """What is computed again, kept elsewhere or freed early."""
    comm: CommSection = CommSection()
    """How ranks talk to each other."""
    launch: LaunchSection = LaunchSection()
    """How many processes train."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Resumable state on disk."""
    monitor: MonitorSection = MonitorSection()
    """What is shown and recorded."""
    run: RunSection = RunSection()
    """Name, place and small print of the run."""

    def problems(self) -> Any:
        if self.memory.release_gradients and self.optim.clip_norm is not None:
            yield "memory", "release_gradients false, or optim.clip_norm null: clipping needs all gradients at once"
        if self.data.fold is not None and isinstance(self.task, CausalLMSection | MaskedLMSection):
            yield (
                "data",
                f"no fold: task {self.task.name} learns from running text; data.validation holds some of it out",
            )
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
    for variants, default in ((SCHEDULES, "wsd"), (OPTIMIZERS, "adamw"), (PRECISIONS, "auto"), (TASKS, "causal_lm")):
        for name, section in variants.items():
            # In Python every variant reads every name, to refuse a wrong one by name; JSON schema needs them apart.
            definition = schema["$defs"][section.__name__]
            definition["properties"]["name"]["enum"] = [name]
            if name != default:
                definition.setdefault("required", []).append("name")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Trainwright recipe"
    return schema
