"""The corpus that every machine has: the source text of the running Python's own standard library.

Used by the quickstart, so that a first model can be trained without a download. Tests, caches and installed packages
are left out; so are the few files that the build or the site generates, because they differ between machines.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from trainwright.base.errors import DataError
from trainwright.data.documents import Shard

__all__ = ["STDLIB_SOURCE", "stdlib_shards"]

STDLIB_SOURCE = "python-stdlib"
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_GENERATED = ("_sysconfigdata", "sitecustomize", "usercustomize")


def stdlib_shards(root: Path | None = None) -> list[Shard]:
    """One text shard for each module, sorted by its label such as `asyncio/base_events.py`."""
    folder = root or Path(sysconfig.get_path("stdlib"))
    shards = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        for name in names:
            if name.endswith(".py") and not name.startswith(_GENERATED):
                path = Path(parent, name)
                status = path.stat()
                key = path.relative_to(folder).as_posix()
                shards.append(Shard(str(path), "text", None, status.st_size, key, str(status.st_mtime_ns)))
    if not shards:
        raise DataError(
            f"no Python source found in the standard library's folder {folder}",
            hint="this Python ships compiled modules only; name a folder of text instead of python-stdlib",
        )
    return sorted(shards, key=lambda shard: shard.key)
