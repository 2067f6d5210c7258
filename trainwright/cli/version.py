"""`trainwright version`"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import trainwright
from trainwright.base.text import align_columns

__all__ = ["version"]

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "pydantic", "transformers")


def version() -> None:
    """Versions of Trainwright, Python and the packages that decide what is computed."""
    rows = [("trainwright", f"{trainwright.__version__} ({Path(trainwright.__file__).parent})")]
    rows.append(("python", f"{platform.python_version()} ({platform.platform()})"))
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    print("\n".join(align_columns(rows)))
