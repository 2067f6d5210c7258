"""A Hugging Face folder becomes a model: safetensors only, everything checked by name before a byte is copied.

Pickle files are refused unread: opening one can run any code it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainwright.base.errors import ModelError
from trainwright.models.backbone import Backbone
from trainwright.models.registry import ModelConfig, build_model, config_from_dict, family_of
from trainwright.models.weights import kept_tensors

__all__ = ["Pretrained", "load_config", "load_pretrained", "read_json"]

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHOWN = 6


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError when it is missing, not JSON or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"no {path.name} in {path.parent}", hint="a Hugging Face model folder with config.json was expected"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="download or save the folder again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder, without its weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}", hint="give the path of a folder that holds config.json")
    return config_from_dict(read_json(folder / "config.json"))


def load_pretrained(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """The model of a local Hugging Face folder, in evaluation mode.

    dtype: of the parameters; None takes what config.json says the weights are (float32 where it says nothing).

    Raises:
        ModelError: unknown architecture, unsupported feature, pickle weights, damaged file, or tensors that are
            missing, unexpected or of another shape (each named).
    """
    pretrained = Pretrained(folder)
    model = build_model(pretrained.config, device="meta", dtype=dtype or pretrained.dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, value in kept_tensors(model).items():
            pretrained.read_into(name, value)
    return model.eval()


class Pretrained:
    """The weights of a local Hugging Face folder, checked by name and shape when it is opened and read one at a time.

    Attributes:
        config: of the model.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ModelError as `load_pretrained` does; no weight is read yet."""
        folder = Path(folder)
        self.config = load_config(folder)
        self._folder = folder
        self._tensors = _TensorFiles(folder, _weight_files(folder))
        self._weights = family_of(self.config).weights
        self._sources = _match(build_model(self.config, device="meta"), self.config, self._tensors)

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says the weights are held in."""
        return _stored_dtype(self._folder)

    def value(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The whole parameter or kept buffer `name` of the model, on the CPU."""
        value = torch.empty(tuple(shape), dtype=dtype)
        self.read_into(name, value)
        return value

    def read_into(self, name: str, value: torch.Tensor) -> None:
        """Write the whole parameter or kept buffer `name` into `value`."""
        for part in self._weights.parts(self.config, name, value.shape):
            place = value if part.row is None else value[part.row]
            read = self._tensors.read(self._sources[part.name])
            place.copy_(self._weights.from_file(self.config, part.name, read))


def _stored_dtype(folder: Path) -> torch.dtype:
    values = read_json(folder / "config.json")
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"config.json: dtype={name!r} is not supported; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise ModelError(f"{index} has no weight_map from tensor names to files")
        files = sorted(set(mapping.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index} points to {name!r}; expected a .safetensors file inside the folder")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
        return files
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_ENDINGS)
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickle ({', '.join(pickles[:_SHOWN])}), which can run code; it is not read",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    raise ModelError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json")


class _TensorFiles:
    """The tensors of one or several safetensors files, opened lazily and mapped, not read."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            path = folder / name
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} cannot be read as safetensors: {error}",
                    hint="the file is damaged or cut off; get it again",
                ) from error
            for key in handle.keys():  # noqa: SIM118 - the handle is not a dict
                if key in self._handles:
                    raise ModelError(f"{folder}: tensor {key!r} is in more than one file")
                self._handles[key] = handle
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[key].get_tensor(key)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"tensor {key!r} is {tensor.dtype}; expected floating-point weights of 16 bits or more")
        return tensor


def _match(model: Backbone, config: ModelConfig, tensors: _TensorFiles) -> dict[str, str]:
    """Where in the files each tensor that the model needs is; ModelError names all that do not fit, before memory is
    taken."""
    weights = family_of(config).weights
    expected = {
        part.name: shape
        for name, value in kept_tensors(model).items()
        for part, shape in weights.file_shapes(config, name, value.shape).items()
    }
    seen: dict[str, str] = {}
    for key in tensors.shapes:
        if key.endswith(weights.ignored):
            continue
        name = key if key in expected or not _lacks_prefix(key, weights.prefix) else weights.prefix + key
        seen[name] = key
    missing = [name for name in expected if name not in seen]
    wrong = [
        f"{name} is {list(tensors.shapes[seen[name]])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in seen and tensors.shapes[seen[name]] != shape
    ]
    zeros = weights.zeros(config)
    unexpected = [name for name in seen if name not in expected and name not in zeros]
    if config.tie_embeddings and "lm_head.weight" in unexpected:
        _check_tied(model, config, tensors, seen)
        unexpected.remove("lm_head.weight")
    for name in (name for name in zeros if name in seen):
        if tensors.read(seen[name]).count_nonzero():
            unexpected.append(f"{name} (config.json says bias=false but it is not zero)")
    problems = [
        f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ModelError(
            f"the weights do not fit the configuration (tensors): {' | '.join(problems)}",
            hint="config.json and the safetensors files must come from the same model",
        )
    return seen


def _lacks_prefix(key: str, prefix: str) -> bool:
    return not key.startswith((prefix, "lm_head."))


def _check_tied(model: Backbone, config: ModelConfig, tensors: _TensorFiles, seen: dict[str, str]) -> None:
    (kept, _), *_ = family_of(config).plan(config).tied
    if kept not in seen:
        return
    head, embedding = tensors.read(seen["lm_head.weight"]), tensors.read(seen[kept])
    if not torch.equal(head, embedding):
        raise ModelError(
            f"config.json ties the output head to the embedding, but lm_head.weight differs from {kept}",
            hint="set tie_word_embeddings to false in config.json",
        )
