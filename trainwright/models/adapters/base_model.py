"""The frozen model that adapters stand beside, named by a checkpoint that does not hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainwright.base.errors import ModelError
from trainwright.models.adapters.apply import AdapterReport
from trainwright.models.adapters.values import Values, adapter_values
from trainwright.models.importing import Pretrained, weight_files
from trainwright.models.registry import ModelConfig

__all__ = ["BaseModel"]

_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class BaseModel:
    """A local Hugging Face folder, and what its weights were when a run began.

    Attributes:
        folder: its absolute path.
        files: xxh3-128 of each weight file by name, as hex.
        seed: of the run, from which parameters are drawn that the folder does not have.
    """

    folder: str
    files: dict[str, str]
    seed: int

    @classmethod
    def read(cls, folder: str | Path, *, seed: int) -> BaseModel:
        """The base at `folder` as it is now; reads every weight file once.

        Raises:
            ModelError: the folder holds no safetensors, or one that cannot be read.
        """
        path = Path(folder).resolve()
        try:
            return cls(str(path), {name: _hash_of(path / name) for name in weight_files(path)}, seed)
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error

    def to_fields(self) -> dict[str, Any]:
        """JSON values, of which `BaseModel(**values)` makes an equal one."""
        return asdict(self)

    def changed(self, now: BaseModel) -> str | None:
        """Which weight files of `now` are not those of this base, as a sentence; None where all are."""
        names = sorted(self.files.keys() | now.files.keys())
        other = [name for name in names if self.files.get(name) != now.files.get(name)]
        return f"{', '.join(other)} in {now.folder} is not what the adapters were trained beside" if other else None

    def values(self, report: AdapterReport, config: ModelConfig) -> Values:
        """The frozen parameters of the adapted model, read from the folder one at a time.

        Args:
            report: of the adapters. config: of the model that they are in.

        Raises:
            ModelError: the folder is gone, or its weights have changed.
        """
        if not Path(self.folder).is_dir():
            raise ModelError(
                f"the model that the adapters stand beside is not at {self.folder}",
                hint="put it back where it was (resuming the run fetches a model of the hub again)",
            )
        changed = self.changed(BaseModel.read(self.folder, seed=self.seed))
        if changed is not None:
            raise ModelError(changed, hint="put the weights back that were there when the run began")
        pretrained = Pretrained(self.folder, config, seed=self.seed)
        return adapter_values(report.linears, pretrained.value, seed=self.seed)


def _hash_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
