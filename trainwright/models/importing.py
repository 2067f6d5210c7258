"""A Hugging Face folder becomes a model: safetensors only, everything checked by name before a byte is copied.

Pickle files are refused unread: opening one can run any code it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import ModelError
from trainwright.models.backbone import Backbone
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.reading import readable
from trainwright.models.initialise import initial_value
from trainwright.models.matching import TensorFiles, match_tensors
from trainwright.models.registry import ModelConfig, build_model, config_from_dict, family_of
from trainwright.models.weights import kept_tensors

__all__ = ["Pretrained", "load_config", "load_pretrained", "read_json", "weight_files"]

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHOWN = 6


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError when it is missing, not JSON or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {path.parent}", hint=f"give a folder that holds {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="download or save the folder again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def load_config(folder: str | Path, *, native: bool = True) -> ModelConfig:
    """The configuration of a Hugging Face folder, without its weights. native: see `config_from_dict`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}", hint="give the path of a folder that holds config.json")
    return config_from_dict(read_json(folder / "config.json"), native=native)


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    seed: int | None = None,
) -> Backbone:
    """The model of a local Hugging Face folder, in evaluation mode, with the head that the folder has.

    dtype: of the parameters; None takes what config.json says the weights are (float32 where it says nothing).
    config, seed: see `Pretrained`.

    Raises:
        ModelError: unknown architecture, unsupported feature, pickle weights, damaged file, or tensors that are
            missing, unexpected or of another shape (each named).
    """
    pretrained = Pretrained(folder, config, seed=seed)
    model = build_model(pretrained.config, device="meta", dtype=dtype or pretrained.dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, value in kept_tensors(model).items():
            pretrained.read_into(name, value)
    return model.eval()


class Pretrained:
    """The weights of a local Hugging Face folder, checked by name and shape when it is opened and read one at a time.

    Args:
        config: of the model that gets the weights: the folder's own, perhaps with another head (`config.head`);
            default the folder's.
        seed: of the parameters of a head that the folder does not have. None refuses to go without them.

    Attributes:
        config: of the model.
        fresh: names of the parameters that the folder does not have, and that start at random.
        notes: sentences for people about these, and about a head of the folder that the model does not use.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None, *, seed: int | None = None) -> None:
        """Raises ModelError as `load_pretrained` does; no weight is read yet."""
        folder = Path(folder)
        theirs = load_config(folder)
        self.config = theirs if config is None else config
        self._seed = seed
        self._folder = folder
        self._tensors = TensorFiles(folder, weight_files(folder))
        if isinstance(self.config, HuggingFaceConfig):
            self._tensors = readable(self._tensors, folder, self.config)
        self._weights = family_of(self.config).weights
        matched = match_tensors(build_model(self.config, device="meta"), theirs, self._tensors, fresh=seed is not None)
        self._sources, self.fresh = matched.sources, matched.fresh
        self.notes = tuple(f"{folder}: {note}" for note in matched.notes)

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
        if name in self.fresh:
            # Without a seed only what is computed is missing: tables that transformers does not save.
            value.copy_(initial_value(name, value.shape, self.config, self._seed or 0))
            return
        for part in self._weights.placed(self.config, name, value.shape):
            place = value if part.row is None else value[part.row]
            read = self._tensors.read(self._sources[part.name])
            place.copy_(self._weights.from_file(self.config, part.name, read))


def _stored_dtype(folder: Path) -> torch.dtype:
    values = read_json(folder / "config.json")
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"config.json: dtype={name!r} is not supported; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights.

    Raises:
        ModelError: there are none that are safetensors, or some that the index names are not there.
    """
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
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}", hint="give the path of a folder that holds config.json")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_ENDINGS)
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickle ({', '.join(pickles[:_SHOWN])}), which can run code; it is not read",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter alone: expected the weights of a whole model as model.safetensors",
            hint="merge the adapter into its model first: trainwright merge",
        )
    raise ModelError(
        f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json",
        hint="give a folder with config.json and weights",
    )
