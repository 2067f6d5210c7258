"""The recipe: schema, YAML and overrides, the origin of each value, validation with every problem at once.

from trainwright.config import load_recipe

loaded = load_recipe("stdlib", ["train.steps=100"])
loaded.recipe.optim.lr, loaded.provenance["optim.lr"]
"""

from trainwright.config.adapter_section import AdapterSection
from trainwright.config.batch import BatchSizes, resolve_batch
from trainwright.config.data_section import (
    DataSection,
    SourceSection,
    TokenizerFromFolder,
    TokenizerFromHub,
    TrainBPE,
    TrainCharacters,
    ValidationFraction,
    ValidationSources,
)
from trainwright.config.deepspeed import Note
from trainwright.config.dump import to_yaml
from trainwright.config.engine_config import BatchSection, ClientOptim, EngineConfig
from trainwright.config.engine_load import LoadedEngineConfig, load_engine_config
from trainwright.config.find import builtin_recipes, find_recipe
from trainwright.config.launch_section import CommSection, LaunchSection
from trainwright.config.load import LoadedRecipe, load_recipe, load_recipe_text
from trainwright.config.memory_section import MemorySection, RecomputeEvery
from trainwright.config.model_section import (
    ModelFromConfig,
    ModelFromFolder,
    ModelFromHub,
    ModelFromPreset,
    ModelSection,
)
from trainwright.config.optim_section import OptimSection, ParameterRule, ScheduleSection
from trainwright.config.parallel_section import ParallelSection
from trainwright.config.precision_section import PrecisionSection
from trainwright.config.provenance import Origin
from trainwright.config.run_section import CheckpointSection, MonitorSection, RunSection, SampleSection
from trainwright.config.schema import Recipe, json_schema
from trainwright.config.tasks import TaskSection
from trainwright.config.train_section import TrainSection

__all__ = [
    "AdapterSection",
    "BatchSection",
    "BatchSizes",
    "CheckpointSection",
    "ClientOptim",
    "CommSection",
    "DataSection",
    "EngineConfig",
    "LaunchSection",
    "LoadedEngineConfig",
    "LoadedRecipe",
    "MemorySection",
    "ModelFromConfig",
    "ModelFromFolder",
    "ModelFromHub",
    "ModelFromPreset",
    "ModelSection",
    "MonitorSection",
    "Note",
    "OptimSection",
    "Origin",
    "ParallelSection",
    "ParameterRule",
    "PrecisionSection",
    "Recipe",
    "RecomputeEvery",
    "RunSection",
    "SampleSection",
    "ScheduleSection",
    "SourceSection",
    "TaskSection",
    "TokenizerFromFolder",
    "TokenizerFromHub",
    "TrainBPE",
    "TrainCharacters",
    "TrainSection",
    "ValidationFraction",
    "ValidationSources",
    "builtin_recipes",
    "find_recipe",
    "json_schema",
    "load_engine_config",
    "load_recipe",
    "load_recipe_text",
    "resolve_batch",
    "to_yaml",
]
