"""From a dict, a file or base64, in Trainwright's language or DeepSpeed's, to the configuration of an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trainwright.base.errors import ConfigError
from trainwright.base.text import align_columns, did_you_mean
from trainwright.config.batch import resolve_batch
from trainwright.config.deepspeed import DEEPSPEED, Import, Note, import_deepspeed
from trainwright.config.deepspeed.run import BATCH_KEYS
from trainwright.config.engine_config import BatchSection, EngineConfig
from trainwright.config.json_file import decode_base64, read_json
from trainwright.config.problems import Problem, config_error, dotted, from_validation
from trainwright.config.reference import section_of_key
from trainwright.config.yaml_file import YamlProblem, read_yaml

__all__ = ["LoadedEngineConfig", "load_engine_config"]

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedEngineConfig:
    """An engine's configuration and where it came from.

    Attributes:
        config: the checked values; the batch sizes are filled in for the number of ranks.
        notes: what became of each key of a DeepSpeed configuration; empty for Trainwright's own.
        source: the language that it was written in.
        name: what messages call it: the file's path, "config" or "base64 config".
    """

    config: EngineConfig
    notes: tuple[Note, ...]
    source: Literal["trainwright", "deepspeed"]
    name: str

    def explain(self) -> str:
        """The notes as a table: key, what became of it."""
        return "\n".join(align_columns([(note.key, str(note).removeprefix(f"{note.key}: ")) for note in self.notes]))


@dataclass(frozen=True)
class _Given:
    """A configuration as it was written, before it is checked."""

    value: Mapping[str, Any]
    name: str
    where: Callable[[KeyPath], str]
    problems: tuple[Problem, ...] = ()


def load_engine_config(
    config: Mapping[str, Any] | EngineConfig | str | Path | None, *, world: int
) -> LoadedEngineConfig:
    """Read and check what `trainwright.initialize(config=...)` was given.

    Args:
        config: a dict; the path of a YAML file (.yaml, .yml) or of a JSON file, which may have comments or be Hjson;
            urlsafe base64 of JSON; None for the defaults. The keys tell whether it is DeepSpeed's language.
        world: all ranks; those that work on the same rows (tensor, context, pipeline) count once in a batch.

    Raises:
        ConfigError: lists every problem found: keys that are unknown, values of the wrong kind, features of DeepSpeed
            that are not built, batch sizes that do not agree, two languages in one configuration.
        MissingDependencyError: a file that is Hjson, without the package hjson.
    """
    given = _read(config)
    ours = [key for key in given.value if key in EngineConfig.model_fields]
    theirs = [key for key in given.value if key in DEEPSPEED]
    if ours and theirs:
        raise config_error(
            given.name,
            [Problem(given.where((key,)), key, "a key of DeepSpeed's") for key in theirs],
            hint=f"the keys {', '.join(ours)} are Trainwright's: write all of it in one of the two languages",
        )
    if theirs or (not ours and _looks_like_deepspeed(given.value)):
        return _load_deepspeed(given, world)
    return _load_own(given, world)


def _looks_like_deepspeed(value: Mapping[str, Any]) -> bool:
    """Whether keys that neither language has are nearer to DeepSpeed's."""
    names = [*EngineConfig.model_fields, *EngineConfig.elsewhere]
    return any(did_you_mean(str(key), DEEPSPEED) and not did_you_mean(str(key), names) for key in value)


def _read(config: Mapping[str, Any] | EngineConfig | str | Path | None) -> _Given:
    if config is None:
        config = {}
    if isinstance(config, EngineConfig):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return _Given(copy.deepcopy(dict(config)), "config", lambda path: "config")
    if not isinstance(config, (str, Path)):
        raise ConfigError(f"seen a {type(config).__name__} for config, expected a dict, the path of a file or base64")
    path = Path(config)
    try:
        is_file = path.is_file()
    except OSError:  # base64 is too long for a name
        is_file = False
    if not is_file:
        decoded = decode_base64(config) if isinstance(config, str) else None
        if decoded is None:
            raise ConfigError(
                f"no configuration at {config}", hint="give a dict, the path of a YAML or JSON file, or base64 of JSON"
            )
        return _sections(read_json(decoded, "base64 config"), "base64 config")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(text, str(path))
    return _sections(read_json(text, str(path)), str(path))


def _sections(value: Any, name: str) -> _Given:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: seen a {type(value).__name__}, expected sections and keys")
    return _Given(value, name, lambda path: name)


def _read_yaml(text: str, name: str) -> _Given:
    try:
        document = read_yaml(text)
    except YamlProblem as error:
        place = f"{name}:{error.line}" if error.line else name
        raise config_error(name, [Problem(place, dotted(error.path), error.message)]) from None

    def where(path: KeyPath) -> str:
        for length in range(len(path), -1, -1):
            if path[:length] in document.lines:
                return f"{name}:{document.lines[path[:length]]}"
        return name

    problems = tuple(Problem(f"{name}:{p.line}", dotted(p.path), p.message) for p in document.problems)
    value = {} if document.value is None else document.value
    return replace(_sections(value, name), where=where, problems=problems)


def _load_own(given: _Given, world: int) -> LoadedEngineConfig:
    problems = list(given.problems)
    config = None
    try:
        config = EngineConfig.model_validate(given.value)
    except ValidationError as error:
        problems += from_validation(error, given.where, _elsewhere)
    if config is not None:
        batch = config.batch
        # The caller's own loader decides about the rows when nothing is said of them.
        if batch.global_ is not None or batch.micro is not None:
            try:
                config = _with_batch(config, batch.global_, batch.micro, batch.accumulation, world)
            except ConfigError as error:
                problems.append(_problem(given, ("batch",), error))
        else:
            config = config.model_copy(update={"batch": BatchSection(accumulation=batch.accumulation or 1)})
            try:
                config.parallel.row_ranks(world)
            except ConfigError as error:
                problems.append(_problem(given, ("parallel",), error))
    if problems or config is None:
        raise config_error(given.name, problems)
    return LoadedEngineConfig(config, (), "trainwright", given.name)


def _elsewhere(name: str) -> str | None:
    path = section_of_key(name)
    return path if path and path.partition(".")[0] in EngineConfig.model_fields else None


def _with_batch(
    config: EngineConfig,
    global_: int | None,
    micro: int | None,
    accumulation: int | None,
    world: int,
    keys: tuple[str, str, str] = ("batch.global", "batch.micro", "batch.accumulation"),
) -> EngineConfig:
    sizes = resolve_batch(global_, micro, accumulation, config.parallel.row_ranks(world), keys=keys, all_ranks=world)
    batch = BatchSection(global_=sizes.global_, micro=sizes.micro, accumulation=sizes.accumulation)
    return config.model_copy(update={"batch": batch})


def _problem(given: _Given, path: KeyPath, error: ConfigError) -> Problem:
    message = f"{error.message}; {error.hint}." if error.hint else f"{error.message}."
    return Problem(given.where(path), "", message)


def _load_deepspeed(given: _Given, world: int) -> LoadedEngineConfig:
    found = import_deepspeed(given.value, name=given.name, world=world)
    problems = [*given.problems, *(replace(p, where=given.where(tuple(p.key.split(".")))) for p in found.problems)]
    config = None
    if not found.problems:
        try:
            config = EngineConfig.model_validate(found.result)
        except ValidationError as error:
            problems += _in_their_words(found, given, error)
    batch = [found.get(key) for key in BATCH_KEYS]
    try:
        ranks = world if config is not None else found.row_ranks
        settled = _with_batch(config or EngineConfig(), batch[0], batch[1], batch[2], ranks, BATCH_KEYS)
        config = settled if config is not None else None
    except ConfigError as error:
        if not any(problem.key in BATCH_KEYS for problem in problems):
            problems.append(_problem(given, (BATCH_KEYS[0],), error))
    if problems or config is None:
        raise config_error(given.name, problems)
    return LoadedEngineConfig(config, tuple(found.notes), "deepspeed", given.name)


def _in_their_words(found: Import, given: _Given, error: ValidationError) -> list[Problem]:
    """Problems of the result, named by the DeepSpeed keys that its values came from."""
    problems = []
    for problem in from_validation(error, lambda path: given.name, _elsewhere):
        origin = next((key for ours, key in found.origins.items() if problem.key == ours), None)
        if origin is None:
            problems.append(problem)
        else:
            place = given.where(tuple(origin.split(".")))
            problems.append(Problem(place, origin, f"({problem.key}) {problem.message}"))
    return problems
